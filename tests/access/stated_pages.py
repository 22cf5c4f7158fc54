"""Whom every page lets in, written down by hand as `stated` does for routes of REST.

`everybody`   strangers too, who see what is public
`user`        who has signed in
`reader`      who has that role, or a higher one, in the namespace of the path
`reader +`    who has that role, or a higher one, in any namespace
`operator`    an admin of the whole registry
`open`        anybody, without a look at who that is
"""

_PAGES = """
GET    /static/{digest}/{name}                  open
GET    /login                                   everybody
POST   /login                                   everybody
GET    /login/provider                          everybody
GET    /login/callback                          everybody
POST   /logout                                  everybody
GET    /account                                 user
POST   /account/tokens                          user
POST   /account/tokens/{token_id}/revoke        user
GET    /{namespace}/-/settings                  admin
POST   /{namespace}/-/settings                  admin
POST   /{namespace}/-/members                   admin
POST   /{namespace}/-/retention                 admin
POST   /{namespace}/-/suites                    admin
POST   /{namespace}/-/publishers/remove         admin
POST   /{namespace}/-/quota                     operator
GET    /{namespace}/-/webhooks                  admin
POST   /{namespace}/-/webhooks/{webhook_id}/replay admin
GET    /inbox                                   reader +
POST   /{namespace}/-/changes/{change_id}/approve admin
POST   /{namespace}/-/changes/{change_id}/cancel admin
GET    /                                        everybody
GET    /search                                  everybody
GET    /bases                                   reader +
GET    /bases/{base:path}                       reader +
GET    /suites                                  reader +
GET    /suites/{suite:path}                     reader +
GET    /conflicts                               everybody
POST   /conflicts                               everybody
GET    /compose                                 publisher +
POST   /compose                                 publisher +
GET    /jobs                                    publisher +
GET    /jobs/{job_id}                           publisher
POST   /jobs/{job_id}/cancel                    publisher
GET    /compositions/{composition_id}           publisher
GET    /compositions/{composition_id}/conflicts publisher
GET    /audit                                   admin +
GET    /docs/errors                             everybody
GET    /docs/errors/{code}                      everybody
GET    /{namespace}/{name}@{channel}            reader
GET    /{namespace}/{name}@{channel}/promote    releaser
POST   /{namespace}/{name}@{channel}/promote    releaser
GET    /{namespace}/{name}@{channel}/rollback   releaser
POST   /{namespace}/{name}@{channel}/rollback   releaser
GET    /{namespace}/{name}@{channel}/approve    publisher
POST   /{namespace}/{name}@{channel}/approve    publisher
GET    /{namespace}/{name}@{channel}/cancel     releaser
POST   /{namespace}/{name}@{channel}/cancel     releaser
GET    /{namespace}/{name}@{channel}/policy     admin
POST   /{namespace}/{name}@{channel}/policy     admin
GET    /{namespace}/{name}/{version}/yank       releaser
POST   /{namespace}/{name}/{version}/yank       releaser
GET    /{namespace}/{name}/{version}/deprecate  releaser
POST   /{namespace}/{name}/{version}/deprecate  releaser
GET    /{namespace}/{name}/compare/{versions}   reader
GET    /{namespace}/{name}/history              reader
GET    /{namespace}/{name}/compare              reader
GET    /{namespace}/{name}:{version}            reader
GET    /{namespace}/{name}/commit/{commit}      reader
GET    /{namespace}/{name}/{version}            reader
GET    /{namespace}/{name}/{version}/files/{path:path} reader
GET    /{namespace}/{name}/{version}/modules    reader
GET    /{namespace}                             reader
GET    /{namespace}/{name}                      reader
"""

STATED_PAGES = {(line.split()[0], line.split()[1]): " ".join(line.split()[2:]) for line in _PAGES.strip().splitlines()}
"""(method, path) -> whom it lets in."""
