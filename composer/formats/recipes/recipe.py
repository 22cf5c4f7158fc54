"""A recipe says what to compose; a lock is the recipe with every input resolved to a digest.

base: smollm2                        # optional: the base of the inputs
inputs:
  - {adapter: acme/sql-migration@prod, weight: 1.0, suite: sql-exact}   # or prompts: [...], for a fit
  - adapter: acme/support-macros:^1.0
    weight: 0.7
    rules: [{layers: 0-9, modules: mlp.*, weight: 0.3}]   # other weights in places: the first rule that holds
method: ties                         # any of docs/methods.md
settings: {density: 0.4, rank: 32}   # of the method; tied: auto | untie | shared | refuse
adapter: acme/assistant:1.0.0        # the combined adapter's release
model: acme/assistant-merged:1.0.0   # the merged checkpoint's release
dtype: bfloat16                      # of the merged checkpoint; the base's own when left out
rounding: {mode: stochastic, seed: 7}   # of the merged checkpoint's values; to the nearest when left out
probe: 8                             # examples of each member's suite for the conflict report; 0 for none
evaluate: [sql-exact, guard-general] # suites for the candidate
gates: ["guard-general.nll within 0.2 of base"]   # [] for none; those against the inputs are added unless one is named
policy: {near_duplicate: error, thresholds: {probe_loss: 0.1}}   # of the conflict report's findings
notes: one line
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from composer.errors import InvalidFile, NotSupported
from composer.formats.recipes.methods import METHOD_NAMES, PIPELINES, parse_settings
from composer.formats.recipes.policy import read_policy
from composer.formats.recipes.rounding import Mode, Rounding, parse_rounding
from composer.formats.recipes.weights import Weight, WeightRule, parse_weight
from composer.formats.untrusted import LONE_SURROGATE, printable

DTYPES = ("float32", "bfloat16", "float16")
MAX_INPUTS = 64
MAX_PROBE = 64
MAX_PROMPTS = 64
MAX_VALUES = 10_000
MAX_FILE_BYTES = 200_000  # YAML takes 300 times its text in memory, and a second for 100,000 bytes


@dataclass(frozen=True, slots=True)
class RecipeInput:
    """`adapter` is a reference; `suite` names the target suite that says what it is for: a probe and a fit take its
    examples. A fit takes `prompts` instead, where there are some."""

    adapter: str
    weight: float = 1.0
    suite: str | None = None
    rules: tuple[WeightRule, ...] = ()
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    inputs: tuple[RecipeInput, ...]
    method: str
    base: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapter: str | None = None
    model: str | None = None
    dtype: str | None = None
    probe: int = 8
    evaluate: tuple[str, ...] = ()
    gates: tuple[str, ...] | None = None
    notes: str = ""
    policy: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rounding: Rounding = field(default_factory=Rounding)

    def to_json(self) -> dict[str, Any]:
        inputs = [
            {
                "adapter": i.adapter,
                "weight": i.weight,
                "suite": i.suite,
                **_rules_json(i.rules),
                **({"prompts": list(i.prompts)} if i.prompts else {}),
            }
            for i in self.inputs
        ]
        return {
            "base": self.base,
            "inputs": inputs,
            "method": self.method,
            "settings": dict(self.settings),
            "adapter": self.adapter,
            "model": self.model,
            "dtype": self.dtype,
            "probe": self.probe,
            "evaluate": list(self.evaluate),
            "gates": None if self.gates is None else list(self.gates),
            "notes": self.notes,
            **({"policy": dict(self.policy)} if self.policy else {}),
            **_rounding_json(self.rounding),
        }


@dataclass(frozen=True, slots=True)
class LockedInput:
    """`files` maps a path to its sha256."""

    repository: str
    version: str
    commit: str
    weight: float
    files: Mapping[str, str]
    rules: tuple[WeightRule, ...] = ()

    @property
    def weighted(self) -> Weight:
        """The weight with its rules."""
        return Weight(self.weight, self.rules)


@dataclass(frozen=True, slots=True)
class Lock:
    """Everything that decides the result, by digest: two equal locks give the same weights, but for the last bits of a
    method that is fitted. `calibration` has for each input the digests of the examples that it is fitted on. `gates`
    are those that the recipe did not name, each member against the inputs on its own suite; they decide what is
    published, not what it is, and the digest does not have them. `method_version` is that of
    the method's pipeline; where it is 1 the digest does not have it, so that older locks keep theirs."""

    base: str
    method: str
    settings: Mapping[str, Any]
    dtype: str | None
    inputs: tuple[LockedInput, ...]
    rounding: Rounding = field(default_factory=Rounding)
    calibration: tuple[Mapping[str, Any], ...] = ()
    gates: tuple[str, ...] = ()
    method_version: int = 1

    def to_json(self) -> dict[str, Any]:
        gates = {"gates": list(self.gates)} if self.gates else {}
        return {**self._content(), **gates, "digest": self.digest}

    @property
    def digest(self) -> str:
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        inputs = [
            {
                "repository": i.repository,
                "version": i.version,
                "commit": i.commit,
                "weight": i.weight,
                "files": dict(i.files),
                **_rules_json(i.rules),
            }
            for i in self.inputs
        ]
        return {
            "base": self.base,
            "method": self.method,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "inputs": inputs,
            **_rounding_json(self.rounding),
            **({"calibration": list(self.calibration)} if self.calibration else {}),
            **({"method_version": self.method_version} if self.method_version > 1 else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Lock":
        inputs = tuple(
            LockedInput(
                i["repository"],
                i["version"],
                i["commit"],
                i["weight"],
                i["files"],
                parse_weight({"rules": i.get("rules", [])}).rules,
            )
            for i in document["inputs"]
        )
        rounding = parse_rounding(**document["rounding"]) if "rounding" in document else Rounding()
        return cls(
            document["base"],
            document["method"],
            document["settings"],
            document["dtype"],
            inputs,
            rounding,
            tuple(document.get("calibration", ())),
            tuple(document.get("gates", ())),
            document.get("method_version", 1),
        )


def load_recipe(text: str, subject: str = "recipe") -> Recipe:
    """Parses YAML. Raises InvalidFile naming the line or the key."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{subject}:{mark.line + 1}" if mark else subject
        raise _bad(where, f"it is not YAML: {getattr(error, 'problem', None) or error}") from error
    return parse_recipe(document, subject)


def parse_recipe(document: object, subject: str = "recipe") -> Recipe:
    """The recipe in a mapping. Raises InvalidFile naming the key: unknown, missing, or of another type."""
    _check_texts(document, subject)
    fields = _mapping(document, subject, set(Recipe.__dataclass_fields__))
    inputs = _list(fields, "inputs", subject)
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise _bad(f"{subject}: inputs", f"1 to {MAX_INPUTS} adapters are needed")
    method = _text(fields, "method", subject)
    if method is None:
        raise _bad(f"{subject}: method", "it is missing", f"Name one of {METHOD_NAMES}.")
    if method not in PIPELINES:
        raise _bad(f"{subject}: method", f"there is no method {printable(method)}", f"Use one of {METHOD_NAMES}.")
    dtype = _text(fields, "dtype", subject)
    if dtype is not None and dtype not in DTYPES:
        raise _bad(f"{subject}: dtype", f"{printable(dtype)} is none of {', '.join(DTYPES)}")
    probe = fields.get("probe", 8)
    if type(probe) is not int or not 0 <= probe <= MAX_PROBE:
        raise _bad(f"{subject}: probe", f"it must be a whole number from 0 to {MAX_PROBE}")
    settings: object = fields.get("settings")
    if not isinstance(settings, dict | None):
        raise _bad(f"{subject}: settings", "it must be a mapping")
    given = cast("dict[str, Any]", settings or {})
    try:
        parse_settings(method, given)
    except NotSupported as error:
        raise _bad(f"{subject}: settings", error.message.rstrip("."), error.next_step) from error
    parsed = tuple(_input(row, f"{subject}: inputs[{index}]") for index, row in enumerate(inputs))
    _refuse_idle_prompts(method, parsed, subject)
    return Recipe(
        inputs=parsed,
        method=method,
        base=_text(fields, "base", subject),
        settings=given,
        adapter=_text(fields, "adapter", subject),
        model=_text(fields, "model", subject),
        dtype=dtype,
        probe=probe,
        evaluate=_texts(fields, "evaluate", subject),
        gates=None if fields.get("gates") is None else _texts(fields, "gates", subject),
        notes=_text(fields, "notes", subject) or "",
        policy=_policy(fields.get("policy"), f"{subject}: policy"),
        rounding=_rounding(fields.get("rounding"), f"{subject}: rounding"),
    )


def _refuse_idle_prompts(method: str, inputs: Sequence[RecipeInput], subject: str) -> None:
    for index, source in enumerate(inputs):
        where = f"{subject}: inputs[{index}]: prompts"
        if source.prompts and not PIPELINES[method].fitted:
            raise _bad(where, f"{method} is not fitted on anything", "Leave them out, or use regmean.")
        if not all(prompt.strip() for prompt in source.prompts):
            raise _bad(where, "one of them is empty")


def _policy(document: object, subject: str) -> Mapping[str, Any]:
    """As it was given, once it is known to be one."""
    try:
        read_policy(document, subject)
    except InvalidFile as error:
        raise _bad(error.subject, error.message.removeprefix(f"{error.subject}: ").rstrip(".")) from error
    return cast("dict[str, Any]", document or {})


def _rounding(document: object, subject: str) -> Rounding:
    """Its mode alone, or a mapping."""
    if document is None:
        return Rounding()
    fields = {"mode": document} if isinstance(document, str) else _mapping(document, subject, {"mode", "seed"})
    seed = fields.get("seed", 0)
    if type(seed) is not int:
        raise _bad(f"{subject}: seed", "it must be a whole number")
    mode = _text(fields, "mode", subject) or Mode.NEAREST
    if mode == Mode.NEAREST and "seed" in fields:
        raise _bad(f"{subject}: seed", "it is for stochastic rounding", "Leave it out, or write mode: stochastic.")
    try:
        return parse_rounding(mode, seed)
    except NotSupported as error:
        raise _bad(subject, error.message.rstrip("."), error.next_step) from error


def _input(row: object, subject: str) -> RecipeInput:
    if isinstance(row, str):
        return RecipeInput(row)
    fields = _mapping(row, subject, set(RecipeInput.__dataclass_fields__))
    adapter, weight = _text(fields, "adapter", subject), fields.get("weight", 1.0)
    if adapter is None:
        raise _bad(f"{subject}: adapter", "it is missing")
    try:
        parsed = parse_weight({"value": weight, "rules": fields.get("rules", [])})
    except NotSupported as error:
        raise _bad(f"{subject}: weight", error.message.rstrip(".")) from error
    prompts = _texts(fields, "prompts", subject)
    if len(prompts) > MAX_PROMPTS:
        raise _bad(f"{subject}: prompts", f"there are more than {MAX_PROMPTS}")
    return RecipeInput(adapter, parsed.value, _text(fields, "suite", subject), parsed.rules, prompts)


def _rules_json(rules: tuple[WeightRule, ...]) -> dict[str, Any]:
    """Nothing where there are none, so that a lock without rules has the digest it always had."""
    return {"rules": [rule.to_json() for rule in rules]} if rules else {}


def _rounding_json(rounding: Rounding) -> dict[str, Any]:
    """Nothing where it is to the nearest, for the same reason."""
    if rounding.mode is Mode.NEAREST:
        return {}
    return {"rounding": {"mode": rounding.mode.value, "seed": rounding.seed}}


def _check_texts(document: object, subject: str) -> None:
    """Every text can be stored, and there is an end to them: aliases make a small file endless."""
    pending = [document]
    for _ in range(MAX_VALUES):
        if not pending:
            return
        value = pending.pop()
        if isinstance(value, str) and LONE_SURROGATE.search(value):
            raise _bad(subject, f"{printable(value)} has half a surrogate pair")
        if isinstance(value, dict):
            pending += [part for item in cast("dict[object, object]", value).items() for part in item]
        elif isinstance(value, list | tuple | set):
            pending += cast("list[object]", value)
    raise _bad(subject, f"it has more than {MAX_VALUES} values")


def _mapping(document: object, subject: str, known: set[str]) -> dict[str, object]:
    if not isinstance(document, dict):
        raise _bad(subject, "it must be a mapping")
    for key in cast("dict[object, object]", document):
        if key not in known:
            name = key[:100] if isinstance(key, str) else printable(key)
            raise _bad(f"{subject}: {name}", f"the key is unknown; known are {', '.join(sorted(known))}")
    return cast("dict[str, object]", document)


def _list(fields: Mapping[str, object], key: str, subject: str) -> Sequence[object]:
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise _bad(f"{subject}: {key}", "it must be a list")
    return cast("list[object]", value)


def _text(fields: Mapping[str, object], key: str, subject: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise _bad(f"{subject}: {key}", "it must be text")
    return value


def _texts(fields: Mapping[str, object], key: str, subject: str) -> tuple[str, ...]:
    values = _list(fields, key, subject)
    if not all(isinstance(value, str) for value in values):
        raise _bad(f"{subject}: {key}", "it must be a list of texts")
    return tuple(str(value) for value in values)


def _bad(where: str, why: str, next_step: str = "Correct the recipe.") -> InvalidFile:
    return InvalidFile("bad_recipe", f"{where}: {why}.", subject=where, next_step=next_step)
