"""Whom every route lets in, written down by hand: a rule in the code that says less than this is found.

`reader`             who has that role, or a higher one, in the namespace of the path
`reader somewhere`   in any namespace
`operator`           an admin of the whole registry
`inside: reader`     the route itself looks at the thing first, then asks for that role in its namespace; `everybody`
                     is shown what each may read, `user` is who has a token, `... somewhere` as above,
                     `reader with a token` excludes anonymous readers
`a or b`             by either role
`open`               anybody
`token of a push`    who has begun it, with the token that the registry then made; not those of users
`absent`             nobody: the answer is always 404
"""

_ROUTES = """
GET    /v1/releases                                                             inside: everybody
GET    /v1/resolve                                                              inside: reader
GET    /v1/follow                                                               inside: everybody
PUT    /v1/fleet/{group}/{node}                                                 inside: agent
DELETE /v1/fleet/{group}/{node}                                                 inside: agent or admin
GET    /v1/fleet                                                                inside: everybody
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}/rollout                 reader
PUT    /v1/{kind}/{namespace}/{name}/channels/{channel}/canary                  releaser
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}/canary                  reader
DELETE /v1/{kind}/{namespace}/{name}/channels/{channel}/canary                  releaser
POST   /v1/{kind}/{namespace}/{name}/channels/{channel}/watch                   agent
GET    /v1/{kind}/{namespace}/{name}/channels                                   reader
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}                         reader
DELETE /v1/{kind}/{namespace}/{name}/channels/{channel}                         releaser
PUT    /v1/{kind}/{namespace}/{name}/channels/{channel}                         releaser
POST   /v1/{kind}/{namespace}/{name}/channels/{channel}/rollback                releaser
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}/history                 reader
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}/judgement               reader
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}/promotions              reader
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}/promotions/{promotion_id} reader
POST   /v1/{kind}/{namespace}/{name}/channels/{channel}/promotions/{promotion_id}/cancel releaser
POST   /v1/{kind}/{namespace}/{name}/channels/{channel}/approvals               publisher
DELETE /v1/{kind}/{namespace}/{name}/channels/{channel}/approvals/{version}     publisher
GET    /v1/{kind}/{namespace}/{name}/channels/{channel}/policy                  reader
PUT    /v1/{kind}/{namespace}/{name}/channels/{channel}/policy                  admin
PUT    /v1/{kind}/{namespace}/{name}/channels/{channel}/policy/exception        admin
DELETE /v1/{kind}/{namespace}/{name}/channels/{channel}/policy/exception        admin
GET    /v1/{kind}/{namespace}/{name}/gates                                      reader
PUT    /v1/{kind}/{namespace}/{name}/gates                                      admin
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/moves                   reader
GET    /v1/{kind}                                                               inside: everybody
GET    /v1/{kind}/{namespace}/{name}                                            reader
POST   /v1/{kind}/{namespace}/{name}/releases                                   publisher
GET    /v1/{kind}/{namespace}/{name}/releases                                   reader
GET    /v1/{kind}/{namespace}/{name}/releases/{version}                         reader
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/target-suite            reader
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/descendants             reader
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/spectrum                reader
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/files/{path:path}       reader
POST   /v1/{kind}/{namespace}/{name}/next-version                               publisher
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/attestations            reader
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/evidence                inside: reader with a token
GET    /v1/worker-keys                                                          reader somewhere
DELETE /v1/worker-keys/{key}                                                    operator
POST   /v1/{kind}/{namespace}/{name}/releases/{version}/signatures              publisher
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/signatures              reader
POST   /v1/{kind}/{namespace}/{name}/releases/{version}/yank                    releaser
POST   /v1/{kind}/{namespace}/{name}/releases/{version}/unyank                  releaser
POST   /v1/{kind}/{namespace}/{name}/releases/{version}/takedown                admin
POST   /v1/{kind}/{namespace}/{name}/releases/{version}/scores                  publisher
POST   /v1/{kind}/{namespace}/{name}/releases/{version}/scores/import           publisher
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/scores                  reader
GET    /v1/{kind}/{namespace}/{name}/releases/{version}/scores/{suite:path}/results reader
DELETE /v1/{kind}/{namespace}/{name}/releases/{version}/scores/{suite:path}/{metric} publisher
POST   /v1/suites                                                               publisher somewhere
GET    /v1/suites                                                               reader somewhere
GET    /v1/suites/{suite:path}                                                  reader somewhere
PUT    /v1/suites/{suite:path}/shared                                           publisher somewhere
POST   /v1/bases/{base:path}/scores                                             publisher somewhere
GET    /v1/bases/{base:path}/scores                                             reader somewhere
GET    /v1/bases/{base:path}/scores/{suite:path}/results                        reader somewhere
DELETE /v1/bases/{base:path}/scores/{suite:path}/{metric}                       publisher somewhere
POST   /v1/bases                                                                publisher somewhere
DELETE /v1/bases/aliases/{alias:path}                                           publisher somewhere
GET    /v1/bases                                                                reader somewhere
GET    /v1/bases/{base:path}                                                    reader somewhere
POST   /v1/bases/{base:path}/deprecate                                          publisher somewhere
POST   /v1/{kind}/{namespace}/{name}/releases/{version}/deprecate               releaser
POST   /v1/upgrades                                                             publisher somewhere
GET    /v1/upgrades/{job_id}                                                    inside: everybody
POST   /v1/evaluations                                                          inside: publisher
GET    /v1/evaluations/{job_id}                                                 inside: everybody
POST   /v1/uploads                                                              inside: publisher
POST   /v1/uploads/{upload_id}/parts/{number}                                   inside: publisher
POST   /v1/uploads/{upload_id}/complete                                         inside: publisher
PUT    /v1/blobs/{sha256}                                                       inside: publisher
GET    /v1/blobs/{sha256}                                                       inside: reader
HEAD   /v1/blobs/{sha256}                                                       inside: reader
GET    /v1/files/{sha256}                                                       open
POST   /v1/compositions                                                         inside: publisher
GET    /v1/compositions/{composition_id}                                        inside: publisher
GET    /v1/compositions/{composition_id}/events                                 inside: publisher
POST   /v1/compositions/{composition_id}/cancel                                 inside: publisher
POST   /v1/conflicts                                                            inside: reader with a token
GET    /v1/conflicts/{check_id}                                                 inside: reader
GET    /v1/jobs                                                                 publisher somewhere
GET    /v1/jobs/{job_id}                                                        inside: publisher
GET    /v1/jobs/{job_id}/events                                                 inside: publisher
POST   /v1/jobs/{job_id}/priority                                               inside: publisher
POST   /v1/jobs/{job_id}/cancel                                                 inside: publisher
GET    /healthz                                                                 open
GET    /metrics                                                                 reader somewhere
GET    /readyz                                                                  open
GET    /v1/audit                                                                admin somewhere
GET    /v1/audit.jsonl                                                          admin somewhere
GET    /v1/audit/chain                                                          operator
POST   /v1/audit/checkpoint                                                     operator
GET    /v1/whoami                                                               inside: everybody
POST   /v1/tokens                                                               reader somewhere
GET    /v1/tokens                                                               reader somewhere
DELETE /v1/tokens/{token_id}                                                    reader somewhere
GET    /v1/namespaces/{namespace}/policies                                      reader
GET    /v1/namespaces/{namespace}/policies/{channel}                            reader
PUT    /v1/namespaces/{namespace}/policies/{channel}                            admin
POST   /v1/namespaces/{namespace}/policies/{channel}/pins                       admin
POST   /v1/namespaces/{namespace}/changes                                       admin
GET    /v1/namespaces/{namespace}/changes                                       admin
GET    /v1/namespaces/{namespace}/changes/{change_id}                           admin
POST   /v1/namespaces/{namespace}/changes/{change_id}/approve                   admin
POST   /v1/namespaces/{namespace}/changes/{change_id}/cancel                    admin
GET    /v1/inbox                                                                reader somewhere
GET    /v1/namespaces                                                           inside: everybody
GET    /v1/namespaces/{namespace}                                               reader
PUT    /v1/namespaces/{namespace}                                               admin
GET    /v1/namespaces/{namespace}/members                                       admin
PUT    /v1/namespaces/{namespace}/members                                       admin
GET    /v1/namespaces/{namespace}/usage                                         inside: reader with a token
PUT    /v1/namespaces/{namespace}/quota                                         operator
PUT    /v1/namespaces/{namespace}/retention                                     admin
POST   /v1/namespaces/{namespace}/retention/plan                                admin
PUT    /v1/users/{user}/person                                                  operator
GET    /v1/users/{user}                                                         operator
DELETE /v1/users/{user}                                                         operator
POST   /v1/sign-in/logout                                                       open
GET    /v1/publishers/{namespace}/{name}                                        admin
POST   /v1/publishers/{namespace}/{name}                                        admin
DELETE /v1/publishers/{namespace}/{name}/{publisher_id}                         admin
POST   /v1/webhooks                                                             admin somewhere
GET    /v1/webhooks                                                             admin somewhere
DELETE /v1/webhooks/{webhook_id}                                                admin somewhere
POST   /v1/webhooks/{webhook_id}/rotate                                         admin somewhere
POST   /v1/webhooks/{webhook_id}/test                                           admin somewhere
GET    /v1/webhooks/{webhook_id}/deliveries                                     admin somewhere
POST   /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay                admin somewhere
POST   /v1/webhooks/{webhook_id}/replay                                         admin somewhere
POST   /oauth/token                                                             open
GET    /api/models/{namespace}/{name}/xet-write-token/{revision:path}           publisher
POST   /xet/{upload}/v1/xorbs/default/{xorb}                                    token of a push
POST   /xet/{upload}/v1/shards                                                  token of a push
POST   /xet/{upload}/shards                                                     token of a push
HEAD   /{namespace}/{name}/resolve/{revision}/{path:path}                       reader
GET    /{namespace}/{name}/resolve/{revision}/{path:path}                       reader
GET    /{name}/resolve/{revision}/{path:path}                                   absent
HEAD   /{name}/resolve/{revision}/{path:path}                                   absent
POST   /api/repos/create                                                        inside: publisher
DELETE /api/repos/delete                                                        inside: reader
POST   /api/repos/move                                                          inside: reader
PUT    /api/models/{namespace}/{name}/settings                                  reader
POST   /api/validate-yaml                                                       open
POST   /api/models/{namespace}/{name}/preupload/{revision:path}                 publisher
POST   /{namespace}/{name}.git/info/lfs/objects/batch                           publisher
PUT    /api/lfs/{namespace}/{sha256}                                            open
POST   /api/lfs/{namespace}/{sha256}                                            open
POST   /api/models/{namespace}/{name}/commit/{revision:path}                    publisher
POST   /api/models/{namespace}/{name}/tag/{revision:path}                       publisher
POST   /api/models/{namespace}/{name}/branch/{channel}                          releaser
POST   /api/models/{namespace}/{name}/branch/main                               publisher
DELETE /api/models/{namespace}/{name}/tag/{revision}                            reader
DELETE /api/models/{namespace}/{name}/branch/{revision}                         reader
GET    /api/whoami-v2                                                           inside: user
GET    /api/models                                                              inside: everybody
GET    /api/models/{namespace}/{name}                                           reader
GET    /api/models/{namespace}/{name}/revision/{revision:path}                  reader
GET    /api/models/{namespace}/{name}/refs                                      reader
GET    /api/models/{namespace}/{name}/commits/{revision:path}                   reader
GET    /api/models/{namespace}/{name}/tree/{revision}                           reader
GET    /api/models/{namespace}/{name}/tree/{revision}/{directory:path}          reader
POST   /api/models/{namespace}/{name}/paths-info/{revision:path}                reader
GET    /api/models/{namespace}/{name}/auth-check                                reader
GET    /api/models/{namespace}/{name}/auth-check/write                          publisher
GET    /api/models/{name}                                                       absent
GET    /api/models/{name}/revision/{revision:path}                              absent
GET    /api/{path:path}                                                         absent
HEAD   /api/{path:path}                                                         absent
POST   /api/{path:path}                                                         absent
PUT    /api/{path:path}                                                         absent
PATCH  /api/{path:path}                                                         absent
DELETE /api/{path:path}                                                         absent
"""
_KINDS = ("adapters", "models", "sets")


def _stated() -> dict[tuple[str, str], str]:
    rules: dict[tuple[str, str], str] = {}
    for line in _ROUTES.strip().splitlines():
        method, path, whom = line.split(maxsplit=2)
        rules |= {(method, path.replace("{kind}", kind)): whom for kind in _KINDS}
    return rules


STATED = _stated()
"""(method, path) -> whom it lets in."""
