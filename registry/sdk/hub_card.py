"""The metadata that a hub reads of a release: the front matter of its model card, and `.eval_results/*.yaml`.

A card of the release is kept: only what it lacks is added to its front matter. Scores that this registry has measured
are written in both forms that hubs know; reported ones stay where the release reports them. `.eval_results` has only
metrics for which higher is better: leaderboards are made from it, and an entry does not state a direction.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

import yaml

from composer.errors import InvalidFile
from composer.formats.checkpoints.card import CARD_FILE, front_matter
from composer.formats.checkpoints.reported import DIRECTORY
from registry.formats.addresses import HUB_SCHEME
from registry.formats.licenses import spdx
from registry.wire.catalog import BaseOut, ReleaseOut
from registry.wire.quality import ScoreOut

_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LIBRARIES = {"adapter": "peft", "model": "transformers"}
_SPDX = re.compile(r"[A-Za-z0-9.+-]+")
_REST_OF_LINE = re.compile(r"\A[ \t]*\r?\n")
_INDEX = "model-index"


def exported_card(release: ReleaseOut, base: BaseOut, existing: bytes | None) -> bytes:
    """The model card of an export. Raises InvalidFile if the existing one has a front matter that cannot be read."""
    stated, wanted = front_matter(existing or b""), _stated(release, base)
    added = {name: value for name, value in wanted.items() if name not in stated}
    if "base_model" in stated and not _names_base(stated["base_model"], base):
        added["base_model"] = wanted["base_model"]  # for a directory of the trainer's machine, which hubs refuse
    if results := _results(release):
        known: object = stated.get(_INDEX)
        index = cast("list[object]", known) if isinstance(known, list) else []
        entry = {"name": release.name, "results": results}
        if entry not in index:
            added[_INDEX] = [*index, entry]
    if existing is None:
        return f"---\n{_dump(added)}---\n{_text(release)}".encode()
    if not added:
        return existing
    text = existing.decode("utf-8", "surrogateescape")
    match = _FRONT_MATTER.match(text)
    block, body = (match.group(1), text[match.end() :]) if match else ("", text)
    return f"---\n{_extended(block, added)}---\n{body}".encode("utf-8", "surrogateescape")


def results_file(release: ReleaseOut) -> tuple[str, bytes] | None:
    """Path and content of the measured scores as `.eval_results` has them; None without any."""
    rows = [
        {
            "dataset": {"id": score.suite, "task_id": score.metric, "revision": score.suite_digest},
            "value": score.value,
            "date": score.measured.isoformat().replace("+00:00", "Z"),
            "notes": ", ".join(
                [f"n={score.n}"] + ([f"standard error {score.stderr:.3g}"] if score.stderr is not None else [])
            ),
        }
        for score in _measured(release)
        if score.higher_is_better
    ]
    if not rows:
        return None
    name = release.repository.replace("/", "-")
    return f"{DIRECTORY}adaptory-{name}.yaml", yaml.safe_dump(rows, sort_keys=False).encode()


def _measured(release: ReleaseOut) -> list[ScoreOut]:
    return [score for score in release.scores if not score.reported]


def _stated(release: ReleaseOut, base: BaseOut) -> dict[str, object]:
    tags = ["adaptory", *([release.adapter.type.lower()] if release.adapter else [])]
    stated: dict[str, object] = {"base_model": _base_name(base), "library_name": _LIBRARIES[release.kind], "tags": tags}
    if license_ := release.licenses.adapter:
        name = spdx(license_)
        stated |= {"license": name.lower()} if _SPDX.fullmatch(name) else {"license": "other", "license_name": name}
    return stated


def _base_name(base: BaseOut) -> str:
    """The base's name on a hub: an alias of that form, or the repository that it was registered from; its name here if
    it has neither."""
    hubs = [url.removeprefix(HUB_SCHEME).partition("@")[0] for url in base.locations if url.startswith(HUB_SCHEME)]
    named = [name for name in (*hubs, *base.aliases) if _HUB_NAME.fullmatch(name)]
    return named[0] if named else base.name


def _results(release: ReleaseOut) -> list[dict[str, object]]:
    """The measured scores as the results of a model index, by suite."""
    by_suite: dict[str, list[ScoreOut]] = {}
    for score in _measured(release):
        by_suite.setdefault(score.suite, []).append(score)
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": suite, "name": suite, "revision": scores[0].suite_digest},
            "metrics": [{"type": score.metric, "value": score.value} for score in scores],
        }
        for suite, scores in by_suite.items()
    ]


def _names_base(stated: object, base: BaseOut) -> bool:
    """Recognizes what a hub can show as the base: a list, a name of this base, or any name of a hub's form."""
    names = (base.name, *base.aliases)
    return isinstance(stated, list) or stated in names or _HUB_NAME.fullmatch(str(stated)) is not None


def _extended(block: str, added: Mapping[str, Any]) -> str:
    """The YAML mapping with these keys added or replaced; the rest stays as it is written. Raises InvalidFile."""
    try:
        root = cast(object, yaml.compose(block, yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    except yaml.YAMLError as error:  # bytes that are not text
        raise InvalidFile(
            "bad_provenance", f"{CARD_FILE}: its front matter is not YAML.", subject=CARD_FILE, next_step="Correct it."
        ) from error
    if isinstance(root, yaml.MappingNode):
        if root.flow_style:
            return _dump({**front_matter(f"---\n{block}---\n".encode()), **added})
        pairs = cast("list[tuple[yaml.ScalarNode, yaml.Node]]", root.value)
        spans = [(key.start_mark.index, value.end_mark.index) for key, value in pairs if key.value in added]
        for start, end in sorted(spans, reverse=True):
            block = block[:start] + _REST_OF_LINE.sub("", block[end:], count=1)
    return block + ("" if block.endswith("\n") or not block else "\n") + _dump(added)


def _dump(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)


def _text(release: ReleaseOut) -> str:
    notes = f"\n{release.notes}\n" if release.notes else ""
    kind = "An adapter" if release.kind == "adapter" else "A merged model"
    name = release.repository.partition("/")[2]
    return f"# {name}\n\n{kind} for {release.base.name}, released as {release.version}.\n{notes}"
