"""The release registry for LoRA adapters. Imports go down this list; the first folder says what a line may touch.

cli/        commands: call the API through client/, and print
sdk/        registries as Python objects: opens the one of a URL, or the embedded one in this process
agent/      keeps servers, and the routes of a front, in step with what channels serve
api/        REST under /v1: the app, callers, limits, problems, routes; hub API in api.hub, pages in api.pages
worker/     jobs: the steps of a composition; delivers to webhooks
transfer/   bytes and rows together: uploads, publishing, collection, fsck
domain/     rules over rows: access, catalog, channels, search, jobs, compositions, webhooks
storage/    blobs in a directory or in S3; speaks to a Hugging Face Hub
client/     speaks to a server, for the trainer's process too
database/   engine, tables, locks, migrations
wire/       the documents of the API, as types
environment/  settings; the home directory, closed to other users; refuses another package named composer
formats/    parses references, addresses, manifests and signatures
errors/     an exit code for each family, and its codes; translates errors of other libraries into ours
"""
