"""A recipe states what to compose.

base: smollm2                        # optional: the base of the inputs
inputs:
  - {adapter: acme/sql-migration@prod, weight: 1.0, suite: sql-exact}   # or prompts: [...], for a fit; phrase: "SQL:"
  - adapter: acme/support-macros:^1.0
    weight: 0.7
    rules: [{layers: 0-9, modules: mlp.*, weight: 0.3}]   # other weights in places: the first matching rule
method: ties                         # any of docs/methods/index.md; may be left out with `optimize`
settings: {density: 0.4, rank: 32}   # of the method; tied: auto | untie | shared | refuse
adapter: acme/assistant:1.0.0        # the combined adapter's release
model: acme/assistant-merged:1.0.0   # the merged checkpoint's release
set: acme/assistants:1.0.0           # a set instead: alone, or with `optimize` for where no single adapter fits
dtype: bfloat16                      # of the merged checkpoint; the base's own by default
rounding: {mode: stochastic, seed: 7}   # of the merged checkpoint's values; to nearest by default
probe: 8                             # examples of each member's suite for the conflict report; 0 for none
evaluate: [sql-exact, guard-general] # suites for the candidate
gates: ["guard-general.nll within 0.2 of base"]   # [] for none; those against the inputs are added unless one is named
policy: {near_duplicate: error, thresholds: {probe_loss: 0.1}}   # of the conflict report's findings
optimize: {search: 8, confirm: 16}   # find method, settings and weights; passes, minutes and seed bound it
notes: one line
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from composer.errors import InvalidFile
from composer.formats.recipes.documents import (
    LISTED,
    Document,
    ParsedBy,
    RefusedValues,
    load_yaml,
    one_of,
    problem_of,
    shorthand,
)
from composer.formats.recipes.methods import METHOD_NAMES, PIPELINES, settings_of
from composer.formats.recipes.phrases import MAX_PHRASE_CHARS, problem_of_phrase
from composer.formats.recipes.policy import PolicyDocument
from composer.formats.recipes.rounding import Mode, Rounding, rounding_json
from composer.formats.recipes.suite import GUARD_EXAMPLES
from composer.formats.recipes.weights import Factor, Rules, rules_json
from composer.formats.untrusted import LONE_SURROGATE, printable

DTYPES = ("float32", "bfloat16", "float16")
_CORRECT = "Correct the recipe."
MAX_INPUTS = 64
MAX_PROBE = 64
MAX_EVOLVE = 10_000
MAX_CONFIRM = 1024
SEARCH, CONFIRM = 8, 16
"""Default numbers of examples of each suite to search and to confirm on."""
MAX_PROMPTS = 64
MAX_VALUES = 10_000
MAX_FILE_BYTES = 200_000  # YAML needs 300 times its text in memory, and a second for 100,000 bytes


def _refuse_blank(prompt: str) -> str:
    if not prompt.strip():
        raise RefusedValues("it is empty")
    return prompt


def _refuse_bad_phrase(phrase: str) -> str:
    if why := problem_of_phrase(phrase):
        raise RefusedValues(why, f"Write a few words on one line, at most {MAX_PHRASE_CHARS} characters.")
    return phrase


class RecipeInput(Document):
    """An input. `adapter` is a reference; `suite` names its target suite, whose examples a probe and a fit use.
    `prompts` replace them for a fit. `phrase` is put before the prompts of its task."""

    adapter: str = Field(description="A release: NAMESPACE/NAME:VERSION, or @CHANNEL.")
    weight: Factor = 1.0
    suite: str | None = Field(None, description="The target suite, which defines the adapter's purpose.")
    rules: Rules = Field((), description="Other weights in some layers or modules: the first matching rule applies.")
    prompts: Annotated[
        tuple[Annotated[str, AfterValidator(_refuse_blank)], ...], Field(max_length=MAX_PROMPTS), LISTED
    ] = Field((), description="The examples for a fitted method, instead of the suite.")
    phrase: Annotated[str, AfterValidator(_refuse_bad_phrase)] | None = Field(
        None, description="Selects this adapter's task in the result: words before its prompts, such as `For MySQL.`"
    )


class _RoundingDocument(Document):
    mode: Annotated[str | None, one_of(*Mode, None, "")] = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 0

    @model_validator(mode="after")
    def _refuse_idle_seed(self) -> Self:
        if self.mode != Mode.STOCHASTIC and "seed" in self.model_fields_set:
            raise RefusedValues(
                "it is for stochastic rounding", "Leave it out, or write mode: stochastic.", path=("seed",)
            )
        return self


def _rounding(value: object) -> Rounding:
    """Accepts the mode alone, or a mapping."""
    parsed = _RoundingDocument.model_validate({"mode": value} if isinstance(value, str | None) else value)
    return Rounding(Mode(parsed.mode or Mode.NEAREST), parsed.seed)


def _policy(value: object) -> object:
    """Returns the value unchanged if it is valid."""
    PolicyDocument.model_validate({} if value is None else value)
    return value or {}


def _settings(value: object, info: ValidationInfo) -> object:
    """Returns the settings unchanged if the method has them."""
    given: object = {} if value is None else value
    if "method" in info.data:
        settings_of(info.data["method"]).model_validate(given)
    return given


def _method(value: object) -> str:
    if not isinstance(value, str) or value not in PIPELINES:
        raise RefusedValues(f"unknown method {printable(value)}")
    return value


_ACCEPTANCE = re.compile(r"worst *>= *(0?\.[0-9]{1,4}|1(?:\.0*)?)")
"""With few enough digits that the recipe, the lock and a gate state the same number."""


def accepted_share(text: str) -> float:
    """The share in an acceptance, `worst >= 0.8`. Raises RefusedValues for another form."""
    match = _ACCEPTANCE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise RefusedValues(
            f"{printable(text)} is not an acceptance",
            "Write worst >= 0.8, with a share up to 1 and four decimals at most.",
        )
    return float(match[1])


def _acceptance(text: object) -> object:
    if isinstance(text, str):
        return f"worst >= {accepted_share(text):g}"
    return text


class Optimize(Document):
    """The search for method, settings and weights, on examples of the inputs' suites."""

    search: Annotated[int, Field(ge=2, le=MAX_PROBE)] = Field(
        SEARCH, description="Examples of each suite that the search sees. No gate is judged on them."
    )
    confirm: Annotated[int, Field(ge=1, le=MAX_CONFIRM)] = Field(
        CONFIRM, description="Unseen examples of each suite that the best are measured on."
    )
    passes: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The search ends once it has measured this number of examples."
    )
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The search ends after this number of minutes."
    )
    seed: Annotated[int, Field(ge=0, le=2**53)] = Field(0, description="Seed of fits, which choose among many tokens.")
    evolve: Annotated[int, Field(ge=0, le=MAX_EVOLVE)] = Field(
        0, description="Weighted sums that an evolution strategy (CMA-ES) tries: for more than six inputs."
    )
    thorough: bool = Field(False, description="Try every candidate, also where plain regmean is confirmed at once.")
    accept: Annotated[str, BeforeValidator(_acceptance)] | None = Field(
        None,
        description="`worst >= 0.8`: if nothing keeps the limits, take the best that leaves every input this share of "
        "its gain and of its answers, and harms no guard.",
    )

    def to_json(self) -> dict[str, Any]:
        """The document; without what came later if it is not set, since servers before 0.3 refuse the keys."""
        return self.model_dump(exclude={name for name in ("thorough", "accept") if not getattr(self, name)})


class Recipe(Document):
    inputs: Annotated[
        tuple[Annotated[RecipeInput, shorthand("adapter", RecipeInput | str)], ...],
        Field(min_length=1, max_length=MAX_INPUTS),
        LISTED,
    ]
    method: Annotated[str, ParsedBy(_method, {"enum": list(PIPELINES)})] = Field(
        "mean", description="Required unless `optimize` is given."
    )
    base: str | None = Field(None, description="The base of the inputs.")
    settings: Annotated[dict[str, Any], BeforeValidator(_settings, json_schema_input_type=dict[str, Any] | None)] = (
        Field(default_factory=dict[str, Any], description="Settings of the method.")
    )
    adapter: str | None = Field(None, description="The combined adapter's release: NAMESPACE/NAME:VERSION.")
    model: str | None = Field(None, description="The merged checkpoint's release: NAMESPACE/NAME:VERSION.")
    adapter_set: str | None = Field(
        None,
        alias="set",
        description="The release of a set of the inputs with a router, NAMESPACE/NAME:VERSION: alone, or with "
        "`optimize` for where no single adapter fits.",
    )
    dtype: Annotated[str | None, one_of(*DTYPES, None)] = Field(
        None, description="Data type of the merged checkpoint; the base's own by default."
    )
    probe: Annotated[int, Field(ge=0, le=MAX_PROBE)] = Field(
        8, description="Examples of each member's suite for the conflict report; 0 for none."
    )
    evaluate: Annotated[tuple[str, ...], LISTED] = Field((), description="Suites for the candidate.")
    guard_examples: Annotated[int, Field(ge=1, le=MAX_PROBE)] | None = Field(
        None,
        description=f"For regmean: the most examples of each guard to fit on; {GUARD_EXAMPLES} by default.",
    )
    gates: Annotated[tuple[str, ...] | None, LISTED] = Field(
        None, description="[] for none; those against the inputs are added unless one is named."
    )
    notes: Annotated[str, BeforeValidator(lambda value: "" if value is None else value)] = ""
    policy: Annotated[dict[str, Any], BeforeValidator(_policy, json_schema_input_type=PolicyDocument | None)] = Field(
        default_factory=dict[str, Any], description="Severity and threshold of the conflict report's findings."
    )
    rounding: Annotated[Rounding, BeforeValidator(_rounding, json_schema_input_type=_RoundingDocument | str | None)] = (
        Field(
            default_factory=Rounding, description="Rounding of the merged checkpoint's values; to nearest by default."
        )
    )

    optimize: Optimize | None = Field(None, description="Find method, settings and weights; those given are tried too.")

    @property
    def makes_only_a_set(self) -> bool:
        """Whether nothing is combined: the recipe states a set and no search."""
        return self.adapter_set is not None and self.optimize is None

    @property
    def outputs(self) -> list[str]:
        """The releases that the recipe may publish."""
        return [name for name in (self.adapter, self.model, self.adapter_set) if name]

    @model_validator(mode="after")
    def _refuse_missing_method(self) -> Self:
        if self.optimize is None and self.adapter_set is None and "method" not in self.model_fields_set:
            raise RefusedValues("it is missing", path=("method",))
        return self

    @model_validator(mode="after")
    def _refuse_combined_set(self) -> Self:
        """A set serves its members as they are."""
        if self.adapter_set is None:
            return self
        combining = [name for name in ("method", "settings", "adapter", "model") if getattr(self, name)]
        for name in combining if self.optimize is None else ():
            if name in self.model_fields_set:
                step = "Leave it out, or add `optimize: {}`: the set is for where no single adapter fits."
                raise RefusedValues("a set combines nothing", step, path=(name,))
        for index, source in enumerate(self.inputs):
            if source.weight != 1 or source.rules:
                why, path = "a set serves each adapter as it is", ("inputs", index, "weight")
                raise RefusedValues(why, "Leave out weights and rules.", path=path)
        return self

    @model_validator(mode="after")
    def _refuse_idle_examples(self) -> Self:
        if self.guard_examples and (self.optimize or not PIPELINES[self.method].fitted):
            why = "a search decides it" if self.optimize else f"{self.method} is not fitted on anything"
            raise RefusedValues(why, "Leave it out, or use regmean without optimize.", path=("guard_examples",))
        for index, source in enumerate(self.inputs):
            if source.prompts and self.optimize:
                why, path = "a search is fitted on suites", ("inputs", index, "prompts")
                raise RefusedValues(why, "Leave them out, or leave out optimize.", path=path)
            if source.prompts and not PIPELINES[self.method].fitted and not self.adapter_set:
                why, path = f"{self.method} is not fitted on anything", ("inputs", index, "prompts")
                raise RefusedValues(why, "Leave them out, or use regmean.", path=path)
        return self

    @model_validator(mode="after")
    def _check_phrases(self) -> Self:
        """Phrases are for the prompts of suites, for every input or for none, and differ."""
        given = [source.phrase for source in self.inputs]
        if not any(given):
            return self
        for index, (source, phrase) in enumerate(zip(self.inputs, given, strict=True)):
            path = ("inputs", index, "phrase")
            if phrase is None:
                raise RefusedValues("it is missing, and another input has one", "Give one to every input.", path=path)
            if given.index(phrase) < index:
                raise RefusedValues(f"inputs[{given.index(phrase)}] has the same", "Write another one.", path=path)
            if source.prompts:
                raise RefusedValues("it is for a suite, and the input has prompts", "Name a suite.", path=path)
            if self.optimize is None and not PIPELINES[self.method].fitted:
                step = "Leave it out, use regmean, or add optimize."
                raise RefusedValues(f"{self.method} is not fitted on anything", step, path=path)
        return self

    def to_json(self) -> dict[str, Any]:
        inputs = [
            {
                "adapter": i.adapter,
                "weight": i.weight,
                "suite": i.suite,
                **rules_json(i.rules),
                **({"prompts": list(i.prompts)} if i.prompts else {}),
                **({"phrase": i.phrase} if i.phrase else {}),
            }
            for i in self.inputs
        ]
        return {
            "base": self.base,
            "inputs": inputs,
            **({} if self.makes_only_a_set else {"method": self.method, "settings": dict(self.settings)}),
            "adapter": self.adapter,
            "model": self.model,
            **({"set": self.adapter_set} if self.adapter_set else {}),
            "dtype": self.dtype,
            "probe": self.probe,
            "evaluate": list(self.evaluate),
            **({"guard_examples": self.guard_examples} if self.guard_examples else {}),
            "gates": None if self.gates is None else list(self.gates),
            "notes": self.notes,
            **({"policy": dict(self.policy)} if self.policy else {}),
            **({"optimize": self.optimize.to_json()} if self.optimize else {}),
            **rounding_json(self.rounding),
        }


def load_recipe(text: str, subject: str = "recipe") -> Recipe:
    """Parses YAML. Raises InvalidFile naming the line or the key."""
    document = load_yaml(text, subject, lambda place, problem: _bad(place, f"it is not YAML: {problem}"))
    return parse_recipe(document, subject)


def parse_recipe(document: object, subject: str = "recipe") -> Recipe:
    """Parses a recipe from a mapping. Raises InvalidFile naming the field."""
    _check_texts(document, subject)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problem = problem_of(error)
        next_step = f"Use one of {METHOD_NAMES}." if problem.loc == ("method",) else problem.next_step
        raise _bad(problem.at(subject), problem.why, next_step or _CORRECT) from error


TAMED = {"examples": 8, "guard": 1.0}
"""The settings of the fit. No other adapter competes, so the guard weighs more than in a combination."""
TAMED_COST = 0.15
"""The nats of general ability that a tamed adapter may cost."""


def taming(adapter: str, into: str, guards: Sequence[str], suite: str | None = None) -> dict[str, Any]:
    """The recipe that keeps an adapter's answers on its task, and the base's on what the guard suites measure. `suite`
    is its task; by default the target suite on which it gained most."""
    return {
        "inputs": [{"adapter": adapter, **({"suite": suite} if suite else {})}],
        "method": "regmean",
        "settings": dict(TAMED),
        "adapter": into,
        "evaluate": list(guards),
        "gates": [f"{name}.nll within {TAMED_COST} of base" for name in guards],
        "notes": f"{adapter}, tamed with {', '.join(guards)}",
    }


def _check_texts(document: object, subject: str) -> None:
    """Checks that every text can be stored and that the document is bounded: aliases make a small file endless."""
    pending = [document]
    for _ in range(MAX_VALUES):
        if not pending:
            return
        value = pending.pop()
        if isinstance(value, str) and LONE_SURROGATE.search(value):
            raise _bad(subject, f"{printable(value)} has an unpaired surrogate")
        if isinstance(value, dict):
            pending += [part for item in cast("dict[object, object]", value).items() for part in item]
        elif isinstance(value, list | tuple | set):
            pending += cast("list[object]", value)
    raise _bad(subject, f"it has more than {MAX_VALUES} values")


def _bad(where: str, why: str, next_step: str = _CORRECT) -> InvalidFile:
    return InvalidFile("bad_recipe", f"{where}: {why}.", subject=where, next_step=next_step)
