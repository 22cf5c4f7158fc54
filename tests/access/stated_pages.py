"""Whom every page lets in, written down by hand as `stated` does for routes of REST.

`everybody`          strangers too, who see what is public
`user`               who has signed in
`reader`             who has that role, or a higher one, in the namespace of the path
`reader somewhere`   in any namespace
`inside: reader`     the page itself looks at the thing first, then asks for that role in its namespace
`open`               anybody, without a look at who that is
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
POST   /{namespace}/-/members                   admin
GET    /                                        everybody
GET    /search                                  everybody
GET    /bases                                   reader somewhere
GET    /bases/{base:path}                       reader somewhere
GET    /suites                                  reader somewhere
GET    /suites/{suite}                          reader somewhere
GET    /jobs                                    publisher somewhere
GET    /jobs/{job_id}                           inside: publisher
GET    /compositions/{composition_id}           inside: publisher
GET    /audit                                   admin somewhere
GET    /{namespace}/{name}@{channel}            reader
GET    /{namespace}/{name}/compare/{versions}   reader
GET    /{namespace}/{name}/{version}            reader
GET    /{namespace}/{name}/{version}/modules    reader
GET    /{namespace}                             reader
GET    /{namespace}/{name}                      reader
"""


def _stated() -> dict[tuple[str, str], str]:
    lines = [line.split(maxsplit=2) for line in _PAGES.strip().splitlines()]
    return {(method, path): whom for method, path, whom in lines}


STATED_PAGES = _stated()
"""(method, path) -> whom it lets in."""
