"""A browser without a window: keeps cookies as browsers do, and sends the headers that tell where a form came from."""

import re
from collections.abc import Mapping
from types import TracebackType

import httpx2

from tests.access.house import House, borrowed

ORIGIN = "https://registry"
HTML = {"Accept": "text/html,application/xhtml+xml"}


class Browser:
    """A browser whose forms carry the fields of the last page that it loaded, unless a test overrides them."""

    def __init__(self, house: House, origin: str = ORIGIN) -> None:
        self.origin = origin
        self.http = httpx2.Client(base_url=origin, transport=borrowed(house), headers=HTML)
        self.loaded = ""

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.http.close()

    @property
    def cookies(self) -> dict[str, str]:
        return {cookie.name: cookie.value or "" for cookie in self.http.cookies.jar}

    def open(self, path: str, **headers: str) -> httpx2.Response:
        answer = self.http.get(path, headers=headers)
        self.loaded = answer.text
        return answer

    def post(
        self,
        path: str,
        fields: Mapping[str, str | list[str]] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        carried = re.findall(r'name="form_token" value="([0-9a-f]*)"', self.loaded)
        form: dict[str, str | list[str]] = {"form_token": carried[0] if carried else "", **(fields or {})}
        sent = headers if headers is not None else {"Origin": self.origin, "Sec-Fetch-Site": "same-origin"}
        return self.http.post(path, data=form, headers=dict(sent))

    def sign_in(self, token: str, following: str = "/") -> httpx2.Response:
        self.open("/login")
        answer = self.post("/login", {"token": token, "next": following})
        if answer.status_code == 303:
            self.open("/account")
        return answer
