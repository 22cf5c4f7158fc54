"""Requests for one task of a release that has several: `acme/both@prod:sql` is the channel with the phrase of `sql`.

Every message of the user gets the phrase, not only the last one: the earlier turns of a conversation then stay as the
server has cached them, and as they were answered.
"""

from collections.abc import Mapping
from typing import Any, cast

from composer.formats.recipes.phrases import with_phrase
from registry.agent.directory import Routes
from registry.errors import Usage

Request = Mapping[str, Any]
_FIELDS = ("messages", "input", "prompt")


def split_task(routes: Routes, model: str) -> tuple[str, str]:
    """A requested model as the name of a channel or version and the task; no task if all of it is a name, or if it is
    not of a release."""
    if model in routes.channels or model in routes.commits or "@" not in model:
        return model, ""
    name, _, task = model.partition(":")
    return name, task


def tasks_of(routes: Routes) -> list[str]:
    """The models that name a task, of versions and of channels whose served version has it."""
    served = {**{name: name for name in routes.commits}, **{c: next(iter(w)) for c, w in routes.channels.items() if w}}
    return [f"{name}:{task}" for name, version in served.items() for task in routes.phrases.get(version, {})]


def phrase_for(routes: Routes, version: str, task: str) -> str:
    """The phrase of a task. Raises Usage if the version does not have it."""
    phrases = routes.phrases.get(version, {})
    if task not in phrases:
        known = f"its tasks are {', '.join(phrases)}" if phrases else "it has no tasks"
        raise Usage("task_unknown", f"{version} has no task {task}: {known}.", subject=task)
    return phrases[task]


def with_phrase_before(document: Request, phrase: str) -> Request:
    """The request with the phrase before each message of the user, or before the prompt. A text that begins with it
    already stays. Raises Usage for a request without text, such as one of token ids."""
    field = next((name for name in _FIELDS if name in document), None)
    if field is None:
        raise _without_text()
    return {**document, field: _phrased(document[field], phrase)}


def _phrased(given: object, phrase: str) -> object:
    if isinstance(given, str):
        return _text(given, phrase)
    if not isinstance(given, list):
        raise _without_text()
    rows = cast("list[object]", given)
    if not all(isinstance(row, str | dict) for row in rows) or not any(map(_is_of_user, rows)):
        raise _without_text()
    return [_text(row, phrase) if isinstance(row, str) else _message(cast(Request, row), phrase) for row in rows]


def _is_of_user(row: object) -> bool:
    return isinstance(row, str) or (isinstance(row, dict) and cast(Request, row).get("role") == "user")


def _message(message: Request, phrase: str) -> Request:
    if not _is_of_user(message):
        return message
    content: object = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _text(content, phrase)}
    parts = list(cast("list[object]", content)) if isinstance(content, list) else []
    for index, part in enumerate(parts):
        row: Request = cast(Request, part) if isinstance(part, dict) else {}
        if isinstance(text := row.get("text"), str):
            parts[index] = {**row, "text": _text(text, phrase)}
            return {**message, "content": parts}
    raise _without_text()


def _text(text: str, phrase: str) -> str:
    return text if text.startswith(f"{phrase} ") else with_phrase(phrase, text)


def _without_text() -> Usage:
    return Usage("prompt_not_text", "The request has no text of a user that a phrase can be put before.")
