"""Encodes examples as token ids and runs teacher-forced passes over them. Shapes: B batch, T tokens, V vocabulary."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from typing import TypeVar

import torch
from torch import nn

from composer.deltas.tensors import most_threads, torch_threads
from composer.errors import Mismatch
from composer.evaluation.hooks import Deltas, deltas_applied
from composer.evaluation.model import LoadedModel
from composer.evaluation.prefix import Prefix
from composer.formats.recipes.suite import Example, Suite

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as token ids: `ids` is the prompt followed by the scored tokens, the completion and, unless the
    suite's completions do not end, the tokenizer's eos."""

    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.prompt_tokens]

    def after(self, prefix: int) -> "Encoded":
        """The tokens after the first `prefix` of the prompt."""
        return Encoded(self.ids[prefix:], self.prompt_tokens - prefix)


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One example under one model: nats over the whole completion, its tokens, and whether greedy decoding reproduces
    it."""

    nats: float
    tokens: int
    exact: bool


def encode(loaded: LoadedModel, example: Example, chat: bool, ends: bool = True) -> Encoded:
    """The token ids that an adapter is trained and scored on: the prompt's, then the completion's and, if it `ends`,
    the tokenizer's eos. With `chat` the prompt is one user turn of the base's template.

    Raises Mismatch for a tokenizer without template or eos, for a completion without tokens, and for an example longer
    than the model's context: truncating it would silently measure something else.
    """
    prompt = encode_prompt(loaded, example.prompt, chat)
    completion = loaded.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    scored = [*completion, _eos(loaded)] if ends else completion
    if not scored:
        raise Mismatch(
            "empty_completion", f"The completion {example.completion[:60]!r} has no tokens.", subject="tokenizer"
        )
    ids = (*prompt, *scored)
    refuse_beyond_context(loaded, len(ids), example.prompt)
    return Encoded(ids, len(prompt))


def refuse_beyond_context(loaded: LoadedModel, tokens: int, prompt: str) -> None:
    """Raises Mismatch for an example with more tokens than the model's context has."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise Mismatch(
            "example_too_long",
            f"An example has {tokens} tokens, the model's context is {limit}: {prompt[:60]!r}.",
            subject=prompt[:60],
        )


def _eos(loaded: LoadedModel) -> int:
    eos: int | None = loaded.tokenizer.eos_token_id
    if eos is None:
        raise Mismatch("no_eos", "The base's tokenizer has no end-of-sequence token.", subject="tokenizer")
    return eos


def no_chat_template(suite: str) -> Mismatch:
    return Mismatch(
        "no_chat_template",
        f"{suite} is a chat suite, and the base's tokenizer has no chat template.",
        subject="tokenizer",
    )


def encode_prompt(loaded: LoadedModel, prompt: str, chat: bool) -> list[int]:
    """The prompt's token ids, at least one. Raises Mismatch for `chat` without a chat template, and for a prompt longer
    than the model's context."""
    tokenizer = loaded.tokenizer
    if not chat:
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise no_chat_template("The suite")
    else:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise Mismatch("empty_prompt", f"The prompt {prompt!r} has no tokens.", subject="tokenizer")
    refuse_beyond_context(loaded, len(ids), prompt)
    return list(ids)


def measure(
    loaded: LoadedModel,
    encoded: Sequence[Encoded],
    deltas: Deltas = (),
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[ExampleScore]:
    """One teacher-forced pass over every example, in order, with `deltas` active.

    Greedy decoding reproduces a completion exactly if, given the completion up to there, every argmax is the reference
    token, including a scored eos. So the same logits give both the loss and exact match, and nothing is generated.

    Examples of similar length share a batch of at most `batch_tokens` padded tokens; on a CPU the batches share the
    cores. `progress` gets the number of examples just finished; an exception from it ends the pass.
    """
    prefix, rest = split_prefix(loaded, encoded)
    results: dict[int, ExampleScore] = {}

    def run(batch: Sequence[int]) -> list[ExampleScore]:
        return measure_batch(prefix, [rest[index] for index in batch])

    def done(batch: Sequence[int], measured: list[ExampleScore]) -> None:
        results.update(zip(batch, measured, strict=True))
        if progress:
            progress(len(batch))

    run_batches(loaded, deltas, spread_batches(loaded, rest, batch_tokens), run, done)
    return [results[index] for index in range(len(encoded))]


def split_prefix(loaded: LoadedModel, encoded: Sequence[Encoded]) -> tuple[Prefix, list[Encoded]]:
    """The common beginning of all examples, and the rest of each."""
    prefix = Prefix.of(loaded, [example.prompt for example in encoded])
    return prefix, [example.after(len(prefix.ids)) for example in encoded]


def run_batches(
    loaded: LoadedModel,
    deltas: Deltas,
    batches: Sequence[Sequence[int]],
    run: Callable[[Sequence[int]], R],
    done: Callable[[Sequence[int], R], None],
) -> None:
    """Calls `run` on each batch with `deltas` active, and `done` with each result, in order and in this thread. On a
    CPU the batches share the cores. An exception ends the pass without the batches that have not begun."""
    workers = max(1, min(loaded.passes, len(batches)))
    with (
        deltas_applied(loaded.model, deltas),
        torch_threads(max(1, most_threads() // workers)),
        ThreadPoolExecutor(workers, "measure") as pool,
    ):
        results = pool.map(run, batches)
        try:
            for batch, result in zip(batches, results, strict=True):
                done(batch, result)
        finally:
            pool.shutdown(cancel_futures=True)  # cancelled: do not wait for the other batches


def spread_batches(loaded: LoadedModel, encoded: Sequence[Encoded], batch_tokens: int | None = None) -> list[list[int]]:
    """Batches for all cores: a few examples are spread too, since one batch over all cores would wait at barriers. They
    become one batch a core where they can: with a third batch on two cores, one core waits."""
    most = batch_tokens or loaded.batch_tokens
    limit = min(most, sum(len(example.ids) for example in encoded) // loaded.passes + 1)
    while len(batches := list(batches_of(encoded, limit))) > loaded.passes and limit < most:
        limit = min(most, limit + limit // 8 + 1)
    return batches


def batches_of(encoded: Sequence[Encoded], limit: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: the peak of memory comes at the start or never."""
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index].ids), index))
    while order:
        size = max(1, limit // len(encoded[order[0]].ids))
        yield order[:size]
        order = order[size:]


@torch.inference_mode()
def measure_batch(prefix: Prefix, batch: Sequence[Encoded]) -> list[ExampleScore]:
    """One teacher-forced forward pass over what follows the prefix in the batch's examples."""
    ids_BT = padded(batch).to(prefix.loaded.device)
    first = min(example.prompt_tokens for example in batch) - 1
    logits_BTV = logits_from(prefix, ids_BT, first)
    measured: list[ExampleScore] = []
    for row, example in enumerate(batch):
        start = example.prompt_tokens - 1 - first
        logits_TV = logits_BTV[row, start : start + example.completion_tokens].float()
        target_T = ids_BT[row, example.prompt_tokens : len(example.ids)]
        nats = nn.functional.cross_entropy(logits_TV, target_T, reduction="sum").item()
        exact = bool((logits_TV.argmax(dim=-1) == target_T).all())
        measured.append(ExampleScore(nats, example.completion_tokens, exact))
    return measured


def padded(batch: Sequence[Encoded]) -> torch.Tensor:
    """B x T ids. Padding is on the right, where a causal model's earlier positions cannot see it: no mask and no
    shifted positions are needed."""
    ids_BT = torch.zeros(len(batch), max(len(example.ids) for example in batch), dtype=torch.long)
    for row, example in enumerate(batch):
        ids_BT[row, : len(example.ids)] = torch.tensor(example.ids)
    return ids_BT


def logits_from(prefix: Prefix, ids_BT: torch.Tensor, first: int) -> torch.Tensor:
    """Logits from position `first` to the last but one: the head is the largest matrix, and the prompts do not need
    it.
    """
    model, after = prefix.loaded.model, prefix.arguments(len(ids_BT))
    kept = torch.arange(first, ids_BT.shape[1] - 1, device=ids_BT.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids_BT, logits_to_keep=kept, **after).logits
    return model(input_ids=ids_BT, **after).logits[:, kept]


def ratio(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Sum of totals over sum of counts, and its standard error over the pairs (None for a single pair).

    The linearised variance of a ratio estimator (Cochran, Sampling Techniques, section 2.11), since examples differ in
    length: se^2 = n / (n - 1) * sum((total_i - r count_i)^2) / sum(count_i)^2.
    """
    n, count = len(totals), sum(counts)
    value = sum(totals) / count
    if n < 2:
        return value, None
    squares = sum((total - value * own) ** 2 for total, own in zip(totals, counts, strict=True))
    return value, sqrt(n / (n - 1) * squares) / count


# Evidence of what a model answers: the log-probability of each completion token of a few examples, under a base alone
# and with an adapter. A server that applies the adapter gives the same ones. Shapes: T tokens, V vocabulary.

EVIDENCE_EXAMPLES = 8
EVIDENCE_TOKENS = 2_048
"""The most tokens of an example. A longer one is left out, since a server processes all of them at each check."""
_DIGITS = 5


def token_evidence(loaded: LoadedModel, suite: Suite, deltas: Deltas) -> list[dict[str, object]]:
    """The evidence of up to 8 examples, chosen by the suite's digest: `ids`, the position `start` of the first
    completion token, and the log-probabilities in nats of the completion's tokens for the `release` and its `base`.
    Raises what `encode` raises."""
    encoded = [encode(loaded, example, suite.chat, suite.ends) for example in suite.sample(EVIDENCE_EXAMPLES)]
    kept = [example for example in encoded if len(example.ids) <= EVIDENCE_TOKENS]
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
