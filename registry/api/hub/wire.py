"""Common parts of the hub API's answers: errors, dates, links and pages, as `huggingface_hub` reads them."""

import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request, Response
from fastapi.routing import APIRoute

from registry.api.http.problems import header_text, problem_response
from registry.api.http.routes import check_document
from registry.api.http.rules import rules_of
from registry.domain.channels.revisions import COMMIT_DIGITS, Located
from registry.errors import Invalid, NotAllowed, RegistryError, Unauthenticated

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

EXCEPTIONS = {
    "repository_unknown": "RepoNotFound",
    "namespace_unknown": "RepoNotFound",
    "revision_unknown": "RevisionNotFound",
    "no_match": "RevisionNotFound",
    "file_unknown": "EntryNotFound",
}
"""The client's exception for each code that has one."""
CREATE = "/api/repos/create"
WRONG_TOKEN = "Invalid credentials in Authorization header"  # noqa: S105
"""The text by which the client distinguishes a wrong token from a repository that needs one."""
_PRERELEASE = re.compile(r"\.v?\d+\.\d+\.\d+-.*\Z")
_MAX_WARNINGS, _MAX_WARNING = 4, 300
"""Proxies accept a few kilobytes of headers."""


class HubRoute(APIRoute):
    """Answers errors with the headers from which the client derives its exception and its message.

    Ignores unknown parameters, since each version of the client sends others. Reads a body only after authorization.
    Not in the OpenAPI document.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "include_in_schema": False})

    def get_route_handler(self) -> Handler:
        answer = super().get_route_handler()
        rules = rules_of(self.dependant) if self.body_field else None

        async def handle(request: Request) -> Response:
            _lower_names(request)
            try:
                # PostgreSQL does not accept a NUL in a query's values.
                for name, value in request.query_params.multi_items():
                    if "\0" in name + value:
                        raise Invalid("bad_value", f"{name[:80]!r} contains a NUL character.")
                if rules is not None:
                    await check_document(request, rules)
                return await answer(request)
            except RegistryError as error:
                return refusal(request, error)

        return handle


def _lower_names(request: Request) -> None:
    """Lowers the repository in the path as `create` does, since a program keeps using its own spelling of the name. Not
    the pre-release of an alias such as acme/sql.1.0.0-RC.1."""
    names = request.path_params
    if "namespace" in names:
        names["namespace"] = names["namespace"].lower()
    if "name" in names:
        kept = _PRERELEASE.search(names["name"])
        names["name"] = names["name"][: kept and kept.start()].lower() + (kept[0] if kept else "")


def refusal(request: Request, error: RegistryError) -> Response:
    """The problem document of an error, for the client."""
    # The client shows no findings: the gate rules that failed come with their numbers.
    failed = [f"{rule['rule']}: {rule['detail']}." for rule in error.findings if rule.get("passed") is False]
    text = " ".join([error.detail, *failed, error.next_step]).replace("ADAPTORY_TOKEN", "HF_TOKEN")
    if error.status == NotAllowed.status:
        text = text.removesuffix(".")  # the client adds one
    headers = {"X-Error-Message": header_text(text)}
    if isinstance(error, Unauthenticated) and error.code == "token_invalid":
        headers["X-Error-Message"] = WRONG_TOKEN
    if (
        error.code in EXCEPTIONS and request.url.path != CREATE
    ):  # otherwise the client would advise creating what it is creating
        headers["X-Error-Code"] = EXCEPTIONS[error.code]
    if commit := getattr(request.state, "commit", None):  # the client then remembers that the file is absent
        headers["X-Repo-Commit"] = commit
    return problem_response(error, headers=headers)


def revision_headers(request: Request, located: Located) -> dict[str, str]:
    """The headers of an answer about a revision; an error after this call has its commit too."""
    request.state.commit = located.commit
    headers = {"X-Repo-Commit": located.commit}
    if located.warning:
        headers["X-HF-Warning"] = f"release; {header_text(located.warning)}"
    return headers


def with_findings(response: Response, about: str, findings: Sequence[Mapping[str, Any]]) -> Response:
    """The response with the findings as warnings. The client logs one for each topic, so the topic is their subject,
    with a number.
    """
    for number, finding in enumerate(findings[:_MAX_WARNINGS]):
        text = header_text(f"{finding['severity']}: {finding['message']}")[:_MAX_WARNING]
        response.headers.append("X-HF-Warning", f"{about} {number}; {text}")
    if more := len(findings[_MAX_WARNINGS:]):
        response.headers.append("X-HF-Warning", f"{about} more; Findings not listed here: {more}.")
    return response


def is_movable(revision: str, located: Located) -> bool:
    """Recognizes a revision that may resolve to another commit later."""
    return len(revision) != COMMIT_DIGITS or revision != located.commit


def file_url(request: Request, located: Located, path: str) -> str:
    """The address of a file at its commit, on the host that the client used."""
    return f"{request.base_url}{located.repository}/resolve/{located.commit}/{quote(path)}"


def next_page(request: Request, cursor: str) -> dict[str, str]:
    """The header that leads to the next page."""
    query = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    path = request.scope["raw_path"].decode("ascii").removeprefix("/")
    return {"Link": f'<{request.base_url}{path}?{urlencode([*query, ("cursor", cursor)])}>; rel="next"'}


def date(moment: datetime) -> str:
    """A moment in UTC as the client parses it: with milliseconds and Z."""
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"
