"""Guards the import name `composer`, which is ours and also that of MosaicML's training library."""

from importlib.util import find_spec
from pathlib import Path

from registry.errors import Unavailable

_OURS = Path(__file__).parents[2] / "composer"
_THEIRS = "trainer"
"""A folder of MosaicML's package that no version of ours has."""


def refuse_other_composer() -> None:
    """Raises Unavailable if `import composer` would not import our package: another one precedes it on the path, or was
    installed over it. Imports neither."""
    spec = find_spec("composer")
    directories = [Path(location) for location in (spec and spec.submodule_search_locations) or ()]
    if directories and directories[0].resolve() == _OURS.resolve() and not (_OURS / _THEIRS).exists():
        return
    advice = "Install adaptory in an environment of its own: `pipx install adaptory` or `uv tool install adaptory`."
    where = directories[0] if directories else "sys.path"
    raise Unavailable(
        "other_composer",
        f"The package `composer` in {where} is another one, such as MosaicML's: adaptory has one of the same name.",
        subject=str(where),
        next_step=advice,
    )
