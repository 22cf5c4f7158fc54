"""Converts errors of the composer, of a stored row and of findings into the family of their code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from composer.errors import ComposerError
from composer.findings import Finding, Severity
from composer.findings import next_step as advice
from composer.next_steps import NEXT_STEPS
from registry.errors import FAMILIES, NO_SPACE, Conflict, Invalid, NotFound, Refused, RegistryError, Unavailable, Usage

PREFIXES = ("layout_", "part_", "variant_")
"""Refused codes that end in a name from a file: a layout, a part or a variant of an adapter."""
_OF_COMPOSER: dict[type[RegistryError], str] = {
    Refused: """
        adapter_type architecture_differs base_changed bias_delta changed_base_layer conflict_members diffusers_variant
        dora empty_completion empty_prompt example_too_long experts fp8_scale gguf_model gguf_module
        harness_differs layout_peft
        loha_rank lokr_factors lokr_layer mixed_types mlx_full module_class needs_base no_chat_template
        no_active_order no_counterpart no_cuda no_eos no_examples_left no_factors no_pairs no_prompts no_rank
        not_decomposable not_a_guard not_extractable not_quantized not_rebased nothing_added nothing_to_extract
        other_adapter padded
        probe_members proof_failed protect_idle protect_unknown quantized_base ranks_differ remote_base rounding
        router_examples rule_ambiguous rule_unused scorer_failed scorer_missing scorer_timeout seed set_on_harness
        streamed tokenizers_differ
        tokens_dropped tokens_without_tokenizer twins_differ two_for_one_key two_variants unknown_config
        vocabulary_mismatch weighted_replacement weights zero_weight_sum
    """,
    Usage: """
        device dtype no_parent unknown_method unknown_profile
    """,
    NotFound: """
        harness_task_unknown
    """,
    Conflict: """
        exists
    """,
    Invalid: """
        a_checkpoint a_set another_layout bad_alpha bad_index bad_json bad_mergekit bad_note bad_policy bad_prompts
        bad_provenance bad_quantization bad_recipe bad_safetensors bad_set chat_template_endless chat_template_failed
        cut_off empty_adapter harness_task_unusable link_outside missing missing_config missing_directory
        missing_index missing_note missing_pair missing_shard missing_weights
        model_not_loadable not_finite rank_mismatch scorer_settings shape_mismatch suite_example suite_field
        suite_json suite_yaml too_large two_checkpoints ungathered unknown_keys unknown_layout unmatched_tensor
        unreadable
    """,
    Unavailable: """
        busy disk_full inputs_changed not_writable verification
    """,
}
"""The codes of the composer, by family. Their next steps are in composer/next_steps.py."""
CODES: dict[type[RegistryError], dict[str, str]] = {
    family: {**family.codes, **{code: NEXT_STEPS[code] for code in _OF_COMPOSER.get(family, "").split()}}
    for family in FAMILIES
}
"""The next step of each code, by family: the register that the documentation lists."""
_FAMILIES = {code: family for family, codes in CODES.items() for code in codes}


def is_registered(code: str) -> bool:
    """Whether the register has the code, or the prefix of a code that ends in a name from a file."""
    return code in _FAMILIES or code.startswith(PREFIXES)


def family_of(code: str) -> type[RegistryError]:
    """The family of a code. Refused for PREFIXES, and for a finding that is an error only because a policy says so."""
    return _FAMILIES.get(code, Refused)


def of_composer(error: ComposerError) -> RegistryError:
    """An error of the library in the family of its code."""
    return family_of(error.code)(error.code, error.message, subject=error.subject, next_step=error.next_step)


def of_failed_work(error: RegistryError | ComposerError | OSError) -> RegistryError:
    """Converts an error that ends a worker's job into the one that the job records; errors of the disk get their own
    code."""
    if isinstance(error, RegistryError):
        return error
    if isinstance(error, ComposerError):
        return of_composer(error)
    return Unavailable(
        "disk_full" if error.errno in NO_SPACE else "disk_error",
        f"This worker cannot read or write its files: {error.strerror or error}.",
        next_step="Check the worker's disk and its log.",
    )


def of_row(row: Mapping[str, Any]) -> RegistryError:
    """The error stored by `to_row`. A code of a newer server has the family of its exit code."""
    code = row["code"]
    family = (
        family_of(code)
        if is_registered(code)
        else next(family for family in FAMILIES if family.exit_code == row["exit_code"])
    )
    return family(code, row["detail"], subject=row["subject"], next_step=row["next"], findings=row["findings"])


def strictly(findings: Iterable[Finding]) -> list[Finding]:
    """The findings with warnings as errors: `--strict`."""
    return [
        replace(finding, severity=Severity.ERROR) if finding.severity is Severity.WARNING else finding
        for finding in findings
    ]


def refuse_errors(
    findings: Sequence[Finding],
    subject: str,
    next_step: str = "Correct the adapter, or name its true base with --base.",
) -> None:
    """Raises an error that names the first error's module and carries all findings; returns if none is an error."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if not errors:
        return
    first = errors[0]
    more = f" ({len(errors) - 1} more like this.)" if len(errors) > 1 else ""
    raise family_of(first.code)(
        first.code,
        f"{first.message}{more}",
        subject=first.subject or subject,
        next_step=advice(first.code, next_step),
        findings=[finding.to_json() for finding in findings],
    )
