"""Finds the base of a push, named by the user or the adapter, and checks the fit before anything is sent."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from registry.errors import Invalid, NotFound, Usage
from registry.errors.translation import refuse_errors, strictly

if TYPE_CHECKING:
    from composer.formats.checkpoints.checkpoint import Architecture
    from registry.client.api import Api
    from registry.wire.catalog import BaseOut

_TRIED = 50
"""Maximum number of registered bases to try an adapter on: each costs a table of tensors."""


def fitting_base(api: "Api", directory: Path, base: str | None, kind: str, *, strict: bool = False) -> str:
    """The name or digest of the base that an adapter or merged model is pushed for, after checking the fit.

    `strict`: warnings are errors. Raises Usage if nothing names a base, NotFound for an unknown one, Invalid if the
    files do not fit it.
    """
    if kind == "model":
        return _base_of_model(api, directory, base)
    from composer.checks.check import check_one
    from composer.formats.adapters.inspection import inspect

    named = base or inspect(directory, None).facts.base_model_name_or_path
    if not named:
        raise _unnamed(directory, "was trained on")
    try:
        known = base_by_name_or_location(api, named)
    except NotFound as unknown:
        fitting = [] if base else _fitting(api, directory)
        fits = f"It fits {', '.join(fitting)}: name one with --base. " if fitting else ""
        raise NotFound(
            unknown.code, unknown.detail, subject=unknown.subject, next_step=f"{fits}{unknown.next_step}"
        ) from None
    seen = inspect(directory, api.architecture(known.digest))
    if any(finding.severity == "error" for finding in seen.findings):
        _refuse_wrong_base(api, directory, known)
        refuse_errors(seen.findings, str(directory))
    if strict:
        refuse_errors(strictly(check_one(seen, [known.name, *known.aliases])), str(directory))
    return base or known.digest


def _base_of_model(api: "Api", directory: Path, base: str | None) -> str:
    from registry.transfer.publishing import inspect_model

    if not base:
        raise _unnamed(directory, "was merged into")
    inspect_model(directory, api.architecture(base))
    return base


def _unnamed(directory: Path, what: str) -> Usage:
    return Usage("base_missing", f"{directory} does not name the base that it {what}.")


def base_by_name_or_location(api: "Api", text: str) -> "BaseOut":
    """A registered base by name, alias, digest, or the directory that it was registered from.

    Trainers write the path they loaded the base from into `base_model_name_or_path`. Raises NotFound.
    """
    from registry.wire.catalog import BaseOut

    try:
        return api.base(text.lstrip("/"))
    except NotFound as error:
        wanted = Path(text).expanduser().resolve()
        for base in api.pages("/v1/bases", BaseOut):
            if any(_directory(location) == wanted for location in base.locations):
                return base
        step = error.next_step
        if wanted.is_dir():
            step = f"Register it: `adaptory base add {text} --name NAME`, or name another base with --base."
        raise NotFound("base_unknown", f"The base {text!r} does not exist.", subject=text, next_step=step) from None


def _directory(location: str) -> Path | None:
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _refuse_wrong_base(api: "Api", directory: Path, base: "BaseOut") -> None:
    """Raises Invalid if the adapter fits another registered base: then the base is wrong, not the adapter's keys.

    Returns if it fits none, or if the adapter is faulty on any base.
    """
    if fitting := _fitting(api, directory, base.digest):
        raise Invalid(
            "wrong_base",
            f"{directory} does not fit the base {base.name}: modules are missing there or differ in shape.",
            subject=str(directory),
            next_step=f"It fits {', '.join(fitting)}: name one with --base.",
        )


def _fitting(api: "Api", directory: Path, without: str = "") -> list[str]:
    """Names of the registered bases that the adapter fits; none if the adapter is faulty on every base."""
    from composer.formats.adapters.inspection import inspect
    from registry.wire.catalog import BaseOut

    def fits(architecture: "Architecture | None") -> bool:
        return not any(finding.severity == "error" for finding in inspect(directory, architecture).findings)

    if not fits(None):
        return []
    others = [base for base in islice(api.pages("/v1/bases", BaseOut), _TRIED) if base.digest != without]
    return [base.name for base in others if fits(api.architecture(base.digest))]
