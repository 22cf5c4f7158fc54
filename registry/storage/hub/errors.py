"""Translates errors of `huggingface_hub` into those of this registry."""

from collections.abc import Generator
from contextlib import contextmanager

from registry.errors import Conflict, NotAllowed, NotFound, Refused, RegistryError, Unavailable, Usage

_MESSAGE_CHARS = 600


@contextmanager
def translate_hub_errors(endpoint: str, what: str) -> Generator[None]:
    """Translates errors of the client; `what` is the address of the call. Other errors pass."""
    from huggingface_hub import errors

    # The hub's own error derives from the one of the HTTP library, which depends on the client's version.
    http_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.HFValidationError as error:
        next_step = "Write hf://ORG/NAME, or hf://ORG/NAME@REVISION."
        raise Usage("bad_hub_address", f"{what}: {_text(error)}", subject=what, next_step=next_step) from error
    except errors.OfflineModeIsEnabled as error:
        message = f"{what} is not in the hub's cache here, and HF_HUB_OFFLINE is set."
        next_step = "Unset HF_HUB_OFFLINE, or download it before."
        raise Unavailable("hub_unavailable", message, subject=what, next_step=next_step) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unavailable(endpoint, what, error) from error
    except errors.HfHubHTTPError as error:
        raise _of_answer(endpoint, what, error, error.response.status_code) from error
    except http_error as error:
        raise _unavailable(endpoint, what, error) from error
    except OSError as error:
        if error.errno is not None:
            raise  # an error of the disk
        raise _unavailable(endpoint, what, error) from error  # a download whose size is wrong, or without a commit
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # The client does not validate answers.
        message = f"{endpoint} does not answer like a hub about {what}: {type(error).__name__}: {_text(error)}"
        next_step = "Check that HF_ENDPOINT is a hub, and ask its operator."
        raise Refused("hub_refused", message, subject=what, next_step=next_step) from error


def _of_answer(endpoint: str, what: str, error: Exception, status: int) -> RegistryError:
    from huggingface_hub import errors

    said = f"{endpoint} answers about {what}: {_text(error)}"
    if isinstance(error, errors.GatedRepoError):
        next_step = "Accept its conditions on its page, and set HF_TOKEN."
        return NotAllowed("hub_access", f"{what} is gated.", subject=what, next_step=next_step)
    if isinstance(error, errors.RevisionNotFoundError):
        next_step = "Name a branch, a tag or a commit that it has, or none for its main branch."
        return NotFound("hub_revision_unknown", said, subject=what, next_step=next_step)
    if isinstance(error, errors.RepositoryNotFoundError):
        next_step = "Check the name. A private one needs HF_TOKEN; it is sent only to the hub that HF_ENDPOINT names."
        message = f"{endpoint} has no {what}, or does not show it to you."
        return NotFound("hub_repository_unknown", message, subject=what, next_step=next_step)
    if isinstance(error, errors.EntryNotFoundError):
        return NotFound("hub_revision_unknown", said, subject=what, next_step="Check the name and the revision.")
    if status in (401, 403):
        next_step = "Set HF_ENDPOINT to this hub and HF_TOKEN to a token of it that may do this."
        return NotAllowed("hub_access", said, subject=what, next_step=next_step)
    if status in (409, 412):
        return Conflict("hub_conflict", said, subject=what, next_step="It was changed meanwhile: try again.")
    if status == 429 or status >= 500:
        return _unavailable(endpoint, what, error)
    return Refused("hub_refused", said, subject=what)


def _unavailable(endpoint: str, what: str, error: BaseException) -> Unavailable:
    return Unavailable("hub_unavailable", f"{endpoint} failed at {what}: {_text(error)}", subject=what)


def printed(text: str) -> str:
    """A hub's text without characters that control a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _text(error: BaseException) -> str:
    """The hub's message; otherwise the error's first lines in one."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(printed(text).split())[:_MESSAGE_CHARS]
