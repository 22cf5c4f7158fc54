"""Findings about a result, from what was measured on it: it adds nothing, or its dtype makes values zero."""

from collections.abc import Mapping, Sequence

from composer.findings import Finding, Severity


def zero_result(method: str, names: Sequence[str]) -> Finding:
    """A warning for a combination whose every delta is zero, although its inputs are not."""
    message = f"{method} of {' and '.join(names)} adds nothing: every delta of the result is zero."
    return Finding("zero_result", Severity.WARNING, method, message)


def unchanged_result(method: str, tensors: int) -> Finding:
    """A warning for a merge whose every weight is the base's, after `tensors` were written with deltas added."""
    message = f"{method} changes nothing: all weights in the {tensors} tensors that it writes equal the base's."
    return Finding("zero_result", Severity.WARNING, method, message, 0.0)


def flushed_to_zero(counts: Mapping[str, int]) -> list[Finding]:
    """A warning for values that are not zero and are zero in float16: by tensor, the number counted over all values."""
    flushed = {name: count for name, count in counts.items() if count}
    if not flushed:
        return []
    worst = max(sorted(flushed), key=lambda name: flushed[name])  # of equal ones, the same at every run
    total = sum(flushed.values())
    message = (
        f"float16 makes {total:,} values zero, in {len(flushed)} tensors, most in {worst} ({flushed[worst]:,}): it has "
        "no number between 0 and 6e-8."
    )
    return [Finding("f16_flushed", Severity.WARNING, worst, message, float(total))]
