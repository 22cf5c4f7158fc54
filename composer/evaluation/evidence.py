"""Evidence of what a model answers: the log-probability of each completion token of a few examples, under a base alone
and with an adapter. A server that applies the adapter gives the same ones. Shapes: T tokens, V vocabulary."""

from collections.abc import Sequence

import torch

from composer.evaluation.hooks import Deltas, deltas_applied
from composer.evaluation.measure import Encoded, encode
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.suite import Suite

MAX_EXAMPLES = 8
MAX_TOKENS = 2_048
"""Of one example: a longer one is left out, since a server reads every one of them at each check."""
_DIGITS = 5


def token_evidence(loaded: LoadedModel, suite: Suite, deltas: Deltas) -> list[dict[str, object]]:
    """For up to 8 examples, chosen by the suite's digest: `ids`, the position `start` of the first completion token,
    and the log-probabilities in nats of the completion's tokens for the `release` and its `base`. Raises what `encode`
    raises."""
    encoded = [encode(loaded, example, suite.chat, suite.ends) for example in suite.sample(MAX_EXAMPLES)]
    kept = [example for example in encoded if len(example.ids) <= MAX_TOKENS]
    base = [_log_probabilities(loaded, example) for example in kept]
    with deltas_applied(loaded.model, deltas):
        release = [_log_probabilities(loaded, example) for example in kept]
    return [
        {"ids": list(example.ids), "start": example.prompt_tokens, "release": adapted, "base": alone}
        for example, adapted, alone in zip(kept, release, base, strict=True)
    ]


@torch.inference_mode()
def _log_probabilities(loaded: LoadedModel, example: Encoded) -> Sequence[float]:
    ids_T = torch.tensor(example.ids, device=loaded.device)
    logits_TV = loaded.model(input_ids=ids_T[None], use_cache=False).logits[0, example.prompt_tokens - 1 : -1].float()
    chosen_T = torch.log_softmax(logits_TV, dim=-1).gather(1, ids_T[example.prompt_tokens :, None])[:, 0]
    return [round(value, _DIGITS) for value in chosen_T.tolist()]
