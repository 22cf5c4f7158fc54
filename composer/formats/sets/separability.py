"""Whether prompts alone tell the tasks of two suites apart: measured by a router of all other prompts, for each one."""

from composer.formats.recipes.suite import Suite
from composer.formats.sets.router import LONGEST, separability

SEPARABLE = 0.9
"""From this share on, prompts tell two suites apart. In the study, pairs of other tasks have 1.00, and pairs with the
same prompts and other answers 0.28 and 0.44."""
MAX_PROMPTS = 16
"""As many prompts of each suite are compared."""


def separability_of(a: Suite, b: Suite) -> float:
    """The share of prompts that are assigned to their own suite, averaged over both: 1 for different tasks, about 0.5
    or less for the same prompts. A prompt that both suites have is in one of them only, in turn, since a router would
    otherwise have seen it. Fewer than two prompts on a side cannot be measured: 0 if any is shared, else 1."""
    shared = sorted(_prompts(a).keys() & _prompts(b).keys())
    turn = {prompt: number % 2 for number, prompt in enumerate(shared)}
    sides = [
        [prompt for prompt in _prompts(suite, 2 * MAX_PROMPTS) if turn.get(prompt, side) == side][:MAX_PROMPTS]
        for side, suite in enumerate((a, b))
    ]
    if min(map(len, sides)) < 2:
        return 0.0 if shared else 1.0
    return separability({str(side): prompts for side, prompts in enumerate(sides)})


def _prompts(suite: Suite, count: int | None = None) -> dict[str, None]:
    """The suite's different prompts, in its fixed random order if only some are wanted. Very short ones, which have no
    n-gram of every length, are left out."""
    return {example.prompt: None for example in suite.sample(count) if len(example.prompt.strip()) >= LONGEST}
