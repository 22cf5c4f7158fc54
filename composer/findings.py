"""Findings: single results of a check, and their verdict."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from composer.errors import Mismatch

HARD = frozenset({
    "replacement_conflict", "replacement_and_delta", "two_rescale", "changed_base", "token_conflict", "tied_weight",
    "tied_both_sides", "vocabulary_mismatch", "shape_conflict", "not_finite", "tokenizers_differ",
})  # fmt: skip
"""Codes that a merge refuses regardless of the policy."""
_NEXT_STEPS = {
    "no_target": "Remove the name from adapter_config.json, or save the adapter again with all of its tensors.",
    "tied_weight": "Choose with --set tied=untie or --set tied=shared; in a recipe, settings: {tied: untie}.",
    "tied_both_sides": "Choose --set tied=untie; in a recipe, settings: {tied: untie}.",
    "replacement_conflict": "Leave one of the two out, or use the difference to the base: --set replacements=delta.",
    "replacement_and_delta": "Leave one of the two out, or use the difference to the base: --set replacements=delta.",
    "two_rescale": (
        "Leave all but one of them out, or merge them in the order in which you give them: --sequential (in a recipe, "
        "settings: {sequential: true}), with the method stack or linear."
    ),
    "missing_part": "Save it again with PEFT (save_pretrained), which writes every part of it.",
    "changed_base": "Leave it out, or all others.",
    "token_conflict": "Leave one of the two out.",
    "vocabulary_mismatch": "Combine adapters that were trained with the same vocabulary.",
    "shape_conflict": "Combine adapters of one base. If they are, name it (--base).",
    "contradicting_bases": (
        "Use the base that each was trained on. If the names mean the same model, correct base_model_name_or_path."
    ),
    "same_adapter": "Leave one of them out, or change its weight.",
    "tokenizers_differ": "Serve them separately, or train one of them again with the tokenizer of the other.",
    "new_embeddings": (
        "Train the tokens with PEFT (trainable_token_indices, or modules_to_save with the embedding), and remove the "
        "file."
    ),
    "missing_modules": "Save it again from the training run, or correct target_modules.",
    "zero_result": "Change the weights, or raise density or lambda.",
    "f16_flushed": "Write bfloat16 or float32.",
    "zero_delta": "Leave it out, or correct its training, its lora_alpha, its weight or lambda.",
}


class Severity(StrEnum):
    """The severity of a finding; an error refuses the operation."""

    NOTICE = "notice"
    WARNING = "warning"
    ERROR = "error"


class Verdict(StrEnum):
    """The outcome of a check, from best to worst. `ok`: measured, on enough examples. `undecided`: measured, and still
    open. `unmeasured`: not
    probed."""

    OK = "ok"
    UNDECIDED = "undecided"
    UNMEASURED = "unmeasured"
    WARN = "warn"
    REFUSE = "refuse"

    @classmethod
    def worst(cls, verdicts: "Iterable[Verdict]") -> "Verdict":
        """The worst of them; `ok` if there are none."""
        return max(verdicts, key=list(cls).index, default=cls.OK)


@dataclass(frozen=True, slots=True)
class Finding:
    """`code` is stable; `subject` names the module, tensor, file or pair; `measure` is the number behind it, if any."""

    code: str
    severity: Severity
    subject: str
    message: str
    measure: float | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "code": self.code,
            "severity": self.severity.value,
            "subject": self.subject,
            "measure": self.measure,
            "message": self.message,
        }


def next_step(code: str, otherwise: str) -> str:
    """The next step for a finding of this code that the file's owner or a setting can fix."""
    return _NEXT_STEPS.get(code, otherwise)


def zero_deltas(name: str, zero: Collection[str], touched: int) -> list[Finding]:
    """The finding for an adapter that adds nothing, or nothing to the modules `zero`, for any reason."""
    if zero and len(zero) == touched:
        why = "It is untrained, or its lora_alpha, its weight or lambda is (almost) 0."
        message = f"{name} adds nothing: all of its {touched} deltas are zero. {why}"
        return [Finding("zero_delta", Severity.WARNING, name, message, float(touched))]
    if zero:
        message = f"{name} adds nothing to {len(zero)} of its {touched} modules, {min(zero)} first."
        return [Finding("zero_modules", Severity.NOTICE, name, message, float(len(zero)))]
    return []


def refuse_errors(subject: str, findings: Sequence[Finding], *, strict: bool = False) -> None:
    """Raises Mismatch for the first error among the findings, with the number of further errors. `strict`: warnings are
    errors too."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    errors += [finding for finding in findings if strict and finding.severity is Severity.WARNING]
    if errors:
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Mismatch(
            errors[0].code,
            f"{subject}: {errors[0].message}{more}",
            subject=errors[0].subject,
            next_step=next_step(errors[0].code, "Run `adaptory inspect` to list everything that does not fit."),
        )
