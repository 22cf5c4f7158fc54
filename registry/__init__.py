"""The release registry for LoRA adapters. A request runs edge -> noun or procedure -> models; nothing points back up.

Edges         cli/ speaks to web/ through client/, in its own process where no server is named; web/ is the REST under
              /v1, on http/ (callers, rules, limits, problems); worker/ does the steps of a composition; schemas/ is the
              wire. Each parses, calls one noun or procedure, and shows what comes of it
Procedures    take resources (what a process holds), open transactions and touch bytes between them: publishing (verify,
              then publish), uploads (bytes on their way), upkeep (gc), fsck
Nouns         take a session and an actor, and write the audit row of what they change: repositories, releases (with
              numbering, breaking, signing), bases, suites, metrics, signatures, gates, channels, yanks, resolve,
              namespaces, tokens, jobs, repeats (requests that come twice), compositions
Search        search asks conditions (what was asked), orders (pages), terms (what a release is found by) and
              words (their index); descriptions says all of what was found, web/documents.py as JSON
Foundations   names (one parser), manifest (files -> commit), access (roles), audit (the event log), errors (one family
              an exit code), settings; storage/ has the promises of a blob store, kept by a directory and by S3;
              models/ the tables, db (the only commit), postgres, outages, statements (prepared ones)
"""
