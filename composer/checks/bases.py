"""The names of bases that adapters and checkpoints state, and whether they contradict each other.

Trainers write what they loaded: a name on a hub, a mirror of it, a quantized copy, or a path. Only two names on a hub
with different models behind them contradict each other; a path states nothing that could be compared.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.findings import Finding, Severity

CODE = "contradicting_bases"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+?)(?:/|$)")
"""A snapshot in the cache of huggingface_hub: models--OWNER--NAME/snapshots/REVISION."""
_FOLDERS = frozenset({
    "adapters", "base", "bases", "cache", "checkpoint", "checkpoints", "ckpt", "ckpts", "content", "data", "home",
    "local", "merged", "mnt", "model", "models", "opt", "out", "output", "outputs", "pretrained", "results", "root",
    "runs", "saved", "src", "tmp", "train", "training", "weights", "workspace",
})  # fmt: skip
"""First parts of a relative path that looks like a name on a hub."""
_STEP = re.compile(r"(?:checkpoint|step|epoch)[-_]?\d+")
_COPY = re.compile(r"(?<![a-z0-9])(?:\d+-?bit|[a-z]{2}\d+|bnb|unsloth|gptq|awq|gguf|mlx|hf|meta|dynamic)(?![a-z0-9])")
"""Parts of a name by which a mirror or a quantized copy of the same model differs."""
_QUANTIZED = re.compile(r"(?:nf|fp|bf|int)\d+")


def hub_name(text: str | None) -> str | None:
    """The name on a hub that `text` states: OWNER/NAME, or a path into the hub's cache. None for another path, a bare
    name, or nothing."""
    if not text:
        return None
    if cached := _CACHED.search(text):
        return f"{cached[1]}/{cached[2]}"
    owner, _, name = text.partition("/")
    if not _HUB_NAME.fullmatch(text) or owner.lower() in _FOLDERS or _STEP.fullmatch(name.lower()):
        return None
    return None if Path(text).is_dir() else text


def model_of(name: str) -> str:
    """The model that a name on a hub means, for comparison: without owner, case, separators, and the parts by which
    copies differ."""
    short = name.rpartition("/")[2].lower().replace("_", "-")
    words = _COPY.sub(lambda match: "" if _is_copy(match[0]) else match[0], short)
    return re.sub(r"[^a-z0-9]", "", words) or short


def _is_copy(word: str) -> bool:
    return not re.fullmatch(r"[a-z]{2}\d+", word) or bool(_QUANTIZED.fullmatch(word))


def names_of(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """The names that a checkpoint has: that of its config, of the hub's cache, and of its directory."""
    stated = config.get("_name_or_path")
    resolved = directory.absolute()
    own = [stated if isinstance(stated, str) else "", str(resolved), str(directory.resolve()), resolved.name]
    return [name for name in own if name]


def contradicting_bases(stated: Sequence[tuple[str, str | None]], base_names: Sequence[str]) -> list[Finding]:
    """A warning for adapters, each with the base that it states, that state different models, and for those that state
    another one than the base they are used on."""
    named = [(adapter, name) for adapter, text in stated if (name := hub_name(text))]
    own = [name for text in base_names if (name := hub_name(text))]
    if own:
        models = {model_of(name) for name in base_names if "/" not in name} | set(map(model_of, own))
        others = [(adapter, name) for adapter, name in named if model_of(name) not in models]
        return [_finding(others, f"and the base is {own[0]}")] if others else []
    if len({model_of(name) for _, name in named}) > 1:
        return [_finding(named, "which are different models")]
    return []


def _finding(named: Sequence[tuple[str, str]], end: str) -> Finding:
    listed = ", ".join(f"{adapter} was trained on {name}" for adapter, name in named[:4])
    more = f", … ({len(named)} in all)" if len(named) > 4 else ""
    return Finding(CODE, Severity.WARNING, named[0][0], f"{listed}{more}, {end}.", float(len(named)))
