"""The policy of a channel: the requirements of a promotion to it.

version: 1                           # of this format
rules:                               # as `adaptory gate` takes them, or with conditions of their own
  - guard-general.nll within 0.1 of base
  - {rule: sql-exact.accuracy >= 0.5, min_n: 200, measured: true}
min_n: 50                            # the least number of examples behind any score that a rule uses
measured: true                       # no rule uses a score that was only reported; `worker`: that no worker attests
missing: evaluate                    # a score that is missing is measured, and the promotion waits; or `refuse`
soak: [{channel: staging, hours: 24}]   # served there this long, and not rolled back
approval: {role: releaser, count: 1} # of people other than the one who promotes
signature: release                   # by a key of the namespace; or `publisher`, not by a worker alone; or `files`
licenses:                            # of the base, the adapter and its data; of a composition, of its inputs too
  stated: [adapter, data]            # must be known
  allow: [Apache-2.0, MIT, CC-BY-4.0]
  refuse: [CC-BY-NC-4.0, {base: llama3.1, adapter: Apache-2.0}]   # a name, or a combination
origin: worker                       # a composition that a worker attests; no release that was pushed
verdict: ok                          # the worst accepted verdict of a composed release's conflict check
loads_in: ["vllm:16", peft]          # servers that must load an adapter as it is
watch: {for: 30m, rules: [errors <= served + 0.01]}   # how a canary proceeds (`registry.formats.watch`)
on_yank: keep                        # go on serving a release that is yanked, until the next move; or `fall_back`
force: admin                         # the role that may force a promotion; or `never`, as without it beside an approval
expires_hours: 24                    # how long a promotion waits for what it lacks
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from composer.errors import NotSupported
from composer.findings import Verdict
from composer.formats.adapters.serving import parse_profile
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
from registry.errors import Invalid
from registry.formats.watch import Watch

VERSION = 1
MAX_CHARS = 50_000
MAX_RULES = 50
MAX_LICENSES = 100
MAX_HOURS = 24 * 90

Rule = Annotated[str, Field(min_length=1, max_length=300)]
MinN = Annotated[int, Field(ge=1, le=2**31 - 1)]
ChannelName = Annotated[str, Field(min_length=1, max_length=64)]
Measured = bool | Literal["worker"]


class ScoreRule(Document):
    """A gate rule, with conditions on the scores that it uses."""

    rule: Rule = Field(description="The rule, as for `adaptory gate`: sql-exact.accuracy >= 0.5")
    min_n: MinN | None = Field(None, description="The minimum number of examples; by default that of the policy.")
    measured: Measured | None = Field(
        None,
        description="Whether scores that were only reported are excluded, or, with `worker`, all that no worker "
        "attests; by default as in the policy.",
    )

    @classmethod
    def of(cls, rule: str) -> Self:
        """The rule without conditions."""
        return cls.model_validate({"rule": rule})


class Soak(Document):
    """A period for which another channel must have served the release."""

    channel: ChannelName
    hours: Annotated[float, Field(gt=0, le=MAX_HOURS)]


class ApprovalRule(Document):
    """Approvals by people other than the one who promotes."""

    role: Literal["publisher", "releaser", "admin"] = Field("releaser", description="The lowest role that counts.")
    count: Annotated[int, Field(ge=1, le=20)] = Field(1, description="The number of people.")


def _version(value: object) -> int:
    if value != VERSION or isinstance(value, bool):
        raise ValueError(f"{VERSION}, the version that this registry reads")
    return VERSION


def _name(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise RefusedValues("it is not a name of printable characters")
    return value


LicenseName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_name)]
Part = Literal["base", "adapter", "data"]


class Combination(Document):
    """Licences that must not occur together; all given ones must be present."""

    base: LicenseName | None = None
    adapter: LicenseName | None = None
    data: LicenseName | None = None

    @model_validator(mode="after")
    def _refuse_empty(self) -> Self:
        if not self.given():
            raise RefusedValues("it names no licence", "Name one of base, adapter or data.")
        return self


def _refused(value: object) -> str | Combination:
    if not isinstance(value, str):
        return Combination.model_validate(value)
    return _name(value)


class Licenses(Document):
    """The licences that a release may have: of its base, of itself, and of its data. SPDX names match in any
    spelling."""

    stated: Annotated[tuple[Part, ...], Field(max_length=3), LISTED] = Field(
        (), description="The parts whose licence must be known."
    )
    allow: Annotated[tuple[LicenseName, ...] | None, Field(max_length=MAX_LICENSES), LISTED] = Field(
        None, description="The only licences that are allowed, of any part."
    )
    refuse: Annotated[
        tuple[Annotated[Any, BeforeValidator(_refused, json_schema_input_type=Combination | LicenseName)], ...],
        Field(max_length=MAX_LICENSES),
        LISTED,
    ] = Field((), description="Licences that are refused for any part, and combinations of parts.")


def _server(value: str) -> str:
    try:
        return str(parse_profile(value))
    except NotSupported as error:
        raise RefusedValues(error.message.rstrip("."), error.next_step) from error


class ChannelPolicy(Document):
    """The requirements of promotions to one channel. All of them must hold; rollbacks have none."""

    version: Annotated[int, ParsedBy(_version, {"const": VERSION})] = Field(description="Version of this format.")
    rules: Annotated[
        tuple[Annotated[ScoreRule, shorthand("rule", ScoreRule | Rule)], ...],
        Field(max_length=MAX_RULES),
        LISTED,
    ] = Field((), description="Gate rules.")
    min_n: MinN | None = Field(None, description="The minimum number of examples behind any score that a rule uses.")
    measured: Measured = Field(
        False,
        description="Whether rules ignore scores that were only reported, or, with `worker`, all that no worker "
        "attests.",
    )
    origin: Literal["worker"] | None = Field(
        None, description="`worker`: only releases that a worker composed and attests, none that was pushed."
    )
    missing: Literal["evaluate", "refuse"] = Field(
        "evaluate", description="How to treat a missing score: measure it and wait, or refuse."
    )
    soak: Annotated[tuple[Soak, ...], Field(max_length=10), LISTED] = Field(
        (), description="Channels that must have served the release for some time without rolling it back."
    )
    approval: ApprovalRule | None = Field(None, description="Approvals by people other than the one who promotes.")
    signature: Literal["release", "files", "publisher"] | None = Field(
        None,
        description="What a signature by one of the namespace's keys must cover. `publisher`: the release, and a "
        "worker's signature does not count.",
    )
    licenses: Licenses | None = Field(
        None, description="Conditions for the licences of the base, the adapter and its data."
    )
    verdict: Annotated[str | None, one_of(*(kind for kind in Verdict if kind is not Verdict.REFUSE), None)] = Field(
        None, description="The worst accepted verdict of a composed release's conflict check."
    )
    loads_in: Annotated[tuple[Annotated[str, AfterValidator(_server)], ...], Field(max_length=10), LISTED] = Field(
        (),
        description="Servers that must load an adapter as it is: vllm:<max_lora_rank>, sglang, lorax, llamacpp, peft.",
    )
    force: Literal["releaser", "admin", "never"] | None = Field(
        None,
        description="The lowest role that may force a promotion; by default never with an approval, else releaser.",
    )
    watch: Watch | None = Field(None, description="How a canary proceeds: its steps, and the rules that end it.")
    on_yank: Literal["fall_back", "keep"] = Field(
        "fall_back",
        description="What the channel serves when its release is yanked: the one before, or the same until it is "
        "moved.",
    )
    expires_hours: Annotated[float, Field(gt=0, le=MAX_HOURS)] = Field(
        24.0, description="How long a promotion waits for what it lacks."
    )

    def to_json(self) -> dict[str, Any]:
        """The document, without unset fields; a rule without conditions is only its text."""
        document = self.model_dump(mode="json", exclude_unset=True, by_alias=True)
        if "rules" in document:
            document["rules"] = [row["rule"] if len(row) == 1 else row for row in document["rules"]]
        return document

    @property
    def forced_by(self) -> Literal["releaser", "admin", "never"]:
        """The lowest role that may force a promotion. By default nobody may bypass an approval."""
        return self.force or ("releaser" if self.approval is None else "never")

    def of_rule(self, row: ScoreRule) -> tuple[int, Measured]:
        """The least number of examples of a rule, and whether its scores must be measured, by a worker or at all."""
        least = self.min_n if row.min_n is None else row.min_n
        return least or 1, self.measured if row.measured is None else row.measured


def of_rules(rules: list[str]) -> ChannelPolicy:
    """The policy that is equal to gate rules alone."""
    return ChannelPolicy.model_validate({"version": VERSION, "missing": "refuse", "rules": rules})


def parse_policy(text: str, subject: str) -> ChannelPolicy:
    """Parses a policy in YAML. Raises Invalid for an invalid one, naming the field."""
    if len(text) > MAX_CHARS:
        raise _bad(subject, f"it is longer than {MAX_CHARS:,} characters")
    document = load_yaml(text, subject, lambda _place, problem: _bad(subject, f"it is not YAML: {problem}"))
    return read_policy(document, subject)


def read_policy(document: object, subject: str) -> ChannelPolicy:
    """Parses a policy from a mapping. Raises Invalid naming the field."""
    try:
        return ChannelPolicy.model_validate(document)
    except ValidationError as error:
        problem = problem_of(error)
        raise _bad(problem.at(subject), problem.why, problem.next_step) from error


def _bad(where: str, why: str, next_step: str = "") -> Invalid:
    return Invalid(
        "bad_channel_policy",
        f"{where}: {why}.",
        subject=where,
        next_step=next_step or "Correct the policy; docs/schemas/channel-policy.schema.json has its fields.",
    )
