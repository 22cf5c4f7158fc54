"""A proof that a merged checkpoint answers as its base with the adapters active.

The checkpoint is loaded as users load it: its own tokenizer, template, config and weights, through transformers. A few
prompts must become the same tokens, and the logits after them must be those of the base in memory with the deltas
active, up to the rounding of the weights.

Shapes: P positions, V vocabulary.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, floor, isfinite, log10
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from composer.deltas.tensors import TORCH_DTYPES
from composer.errors import InvalidFile, Mismatch, NotSupported, RefusedOutput
from composer.evaluation.hooks import Deltas, deltas_applied
from composer.evaluation.measure import (
    Encoded,
    encode,
    encode_prompt,
    logits_from,
    padded,
    run_batches,
    spread_batches,
)
from composer.evaluation.model import LoadedModel, load_model, load_tokenizer
from composer.evaluation.prefix import Prefix
from composer.formats.checkpoints.card import CARD_FILE
from composer.formats.checkpoints.staging import NOTE_FILE, write_json
from composer.formats.recipes.phrases import with_phrase
from composer.formats.recipes.rounding import Mode
from composer.formats.recipes.suite import Example, Suite
from composer.merge.plan import MergePlan
from composer.merge.reference import MergeReference
from composer.merge.side_files import SideFiles

MAX_PROMPTS = 16
MAX_TOKENS = 1_024
"""Of a prompt with its completion. Longer ones are left out."""
MAX_POSITIONS = 256
"""Of all prompts together: the logits of each position are kept, a megabyte for the largest vocabularies."""
_LAST_POSITIONS = 16
"""Those of a prompt without a completion that are compared."""
LEAST_WITHIN = 0.95
"""The share of positions within the limit. After any rounding, a mixture of experts may send a few tokens to other
experts; a wrong tensor moves nearly all positions."""
LIMITS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 0.1}
"""The distance that rounding the weights to a dtype may cause. For two adapters on SmolLM2-135M it was at most 1e-5 in
float32, 0.002 in float16 and 0.036 in bfloat16; the base without them was at 0.9."""
Load = Callable[[Path], LoadedModel]
_ROUNDED_ACTIVATIONS = 4.0
"""Times the limit where float32 does not fit in memory: on that model, the distances were 0.025 and 0.19."""


@dataclass(frozen=True, slots=True)
class ProofPrompt:
    """A prompt to compare on, and its completion, whose positions are compared. Without a completion, the prompt's last
    positions are. `chat` and `ends` are as in a suite."""

    prompt: str
    completion: str = ""
    chat: bool = False
    ends: bool = True

    def encoded(self, loaded: LoadedModel) -> Encoded:
        """The token ids. Raises Mismatch as `encode` does."""
        if self.completion:
            return encode(loaded, Example(self.prompt, self.completion), self.chat, self.ends)
        ids = encode_prompt(loaded, self.prompt, self.chat)
        return Encoded(tuple(ids), max(1, len(ids) - _LAST_POSITIONS))


def proof_prompts(suites: Sequence[Suite], phrases: Mapping[str, str] | None = None) -> list[ProofPrompt]:
    """Up to MAX_PROMPTS examples, spread over the suites. `phrases` are those before their prompts, by suite."""
    each, known = max(1, MAX_PROMPTS // max(1, len(suites))), phrases or {}
    asked = [(suite, example) for suite in suites[:MAX_PROMPTS] for example in suite.sample(each)]
    return [
        ProofPrompt(with_phrase(known.get(suite.name, ""), example.prompt), example.completion, suite.chat, suite.ends)
        for suite, example in asked
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The answers of a merged checkpoint, compared with a `reference`: its base with deltas active. `equal` positions
    of all have the same likeliest next token. A distance is |a - b| / |b| of two positions' logits, each minus their
    mean: `distance` is the largest, rounded up; `base_distance` is the median of the base alone. `within` positions are
    within `limit`, that of `dtype`: the weights' own, or that of the arithmetic where it is coarser. `computed_in` is
    the dtype of the reference's arithmetic.

    `failed`: the first thing that differs. `undecided`: the base alone is within the limit on most positions too, so
    that the prompts do not show whether the deltas were added; or the result is beyond the limit, and so is what
    rounding alone makes of the reference. `impossible`: why nothing could be compared.
    """

    state: Literal["proved", "failed", "undecided", "impossible"]
    reference: str
    why: str = ""
    prompts: int = 0
    positions: int = 0
    equal: int = 0
    within: int = 0
    distance: float = 0.0
    limit: float = 0.0
    dtype: str = ""
    computed_in: str = ""
    base_equal: int = 0
    base_distance: float = 0.0

    @property
    def words(self) -> str:
        """One sentence or two for a card, a page and a terminal."""
        if self.state == "impossible":
            return f"Whether it answers as {self.reference} could not be compared: {self.why}"
        if self.state == "failed":
            return f"It does not answer as {self.reference}: {self.why}"
        kept = f", kept on {self.within}" if self.within < self.positions else ""
        measured = (
            f"Loaded with transformers, it answers as {self.reference} on {self.equal} of {self.positions} positions "
            f"of {self.prompts} prompts; its logits differ by {self.distance:g} at most (limit for {self.dtype}: "
            f"{self.limit:g}{kept}), those of the base alone by {self.base_distance:.1g} in the median."
        )
        return f"{measured} {self.why}".rstrip()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "words": self.words}

    def refuse_failed(self) -> None:
        """Raises RefusedOutput with `proof_failed`."""
        if self.state == "failed":
            raise RefusedOutput("proof_failed", f"The merged model is not kept. {self.words}", subject=self.reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpectedAnswers:
    """The answers that the result should give: the token ids that `tokenizer` makes of each prompt as text and, where
    there is a chat template, as a chat; the rows to compare, and their logits (P x V) from the reference and from the
    base alone."""

    tokenizer: Any
    ids: Mapping[str, Sequence[Sequence[int]]]
    rows: Sequence[Encoded]
    logits: torch.Tensor
    base_logits: torch.Tensor
    dtype: torch.dtype


def prove(
    plan: MergePlan,
    directory: Path,
    prompts: Sequence[ProofPrompt],
    device: str = "auto",
    memory: int | None = None,
) -> Proof:
    """Compares the merged checkpoint in `directory` with the plan's reference. Loads one model after the other, in
    float32 where that fits; one that does not fit in memory, or in `memory` bytes, is streamed from the disk."""
    reference = plan.reference()
    if reference.impossible:
        return Proof(state="impossible", reference=reference.words, why=reference.impossible)
    load = partial(load_model, device=device, memory=memory, exact=True)
    try:
        expected = _expected(plan, reference, prompts, load)
    except (InvalidFile, Mismatch, NotSupported) as error:  # of the base or the prompts, not of the result
        why = _without_path(error, plan.checkpoint.path)
        return Proof(state="impossible", reference=reference.words, why=why)
    try:
        loaded = load(directory)
        if why := _other_tokens(loaded, expected):
            return Proof(state="failed", reference=reference.words, why=why)
        logits, computed = _logits(loaded, expected.rows), loaded.model.dtype
    except (InvalidFile, Mismatch) as error:
        return Proof(state="failed", reference=reference.words, why=_without_path(error, directory))
    if logits.shape != expected.logits.shape:
        why = f"its logits have the shape {list(logits.shape)} instead of {list(expected.logits.shape)}."
        return Proof(state="failed", reference=reference.words, why=why)
    del loaded
    proof = _compared(logits, expected, (_dtype_of(plan), expected.dtype, computed), reference.words)
    if proof.state == "failed" and plan.rounding.mode is Mode.NEAREST:
        return _judged_by_rounding(proof, logits, _rounded_logits(plan, reference, expected.rows, load))
    return proof


def _without_path(error: InvalidFile | Mismatch | NotSupported, directory: Path) -> str:
    return error.message.removeprefix(f"{directory}: ")


def record_proof(directory: Path, proof: Proof) -> None:
    """Adds the proof to the note and the card of the merged checkpoint."""
    note: dict[str, Any] = json.loads((directory / NOTE_FILE).read_bytes())
    write_json(directory / NOTE_FILE, note | {"proof": proof.to_json()})
    with (directory / CARD_FILE).open("a", encoding="utf-8") as card:
        card.write(f"\n{proof.words}\n")


def _expected(
    plan: MergePlan, reference: MergeReference, prompts: Sequence[ProofPrompt], load: Load
) -> _ExpectedAnswers:
    """Raises NotSupported, Mismatch or InvalidFile for a base that cannot be loaded or does not take the deltas, and
    for prompts that it cannot read."""
    loaded = _base(plan, reference, load)
    loaded = replace(loaded, tokenizer=_expected_tokenizer(plan.checkpoint.path, plan.side_files, loaded))
    ids: dict[str, list[list[int]]] = {}
    encoded: list[Encoded] = []
    for prompt in prompts:
        try:
            as_text_and_chat = _ids(loaded, prompt.prompt, chat=loaded.tokenizer.chat_template is not None)
            encoded.append(prompt.encoded(loaded))
        except Mismatch as error:
            if error.code != "example_too_long":
                raise
        else:
            ids[prompt.prompt] = as_text_and_chat
    rows = _bounded(encoded)
    return _ExpectedAnswers(
        tokenizer=loaded.tokenizer,
        ids=ids,
        rows=rows,
        logits=_logits(loaded, rows, reference.deltas),
        base_logits=_logits(loaded, rows),
        dtype=loaded.model.dtype,
    )


def _base(plan: MergePlan, reference: MergeReference, load: Load) -> LoadedModel:
    """The base, with the vocabulary of the result. Raises what `_expected` raises."""
    loaded = load(plan.checkpoint.path)
    if reference.vocabulary_rows:
        if loaded.streamed:
            message = "The vocabulary grows, and the base does not fit in memory."
            raise NotSupported("streamed", message, subject=plan.checkpoint.path.name)
        loaded.model.resize_token_embeddings(reference.vocabulary_rows, mean_resizing=False)
    return loaded


@torch.no_grad()
def _rounded_logits(
    plan: MergePlan, reference: MergeReference, rows: Sequence[Encoded], load: Load
) -> torch.Tensor | None:
    """P x V: the logits of the base whose weights have the deltas added and are rounded as the result's are. None where
    they do not fit in memory."""
    base = _base(plan, reference, load)
    own = set(map(id, base.model.parameters()))
    try:
        with deltas_applied(base.model, reference.deltas, in_weights=True):
            for parameter in base.model.parameters():
                if plan.dtype is not None or id(parameter) not in own:
                    parameter.copy_(parameter.to(_dtype_of(plan)))
            return _logits(base, rows)
    except NotSupported:
        return None


def _expected_tokenizer(base: Path, side_files: SideFiles, loaded: LoadedModel) -> Any:
    """The base's own tokenizer, or that of an adapter, beside the base's other files."""
    if not side_files.tokenizer.files:
        return loaded.tokenizer
    with TemporaryDirectory(prefix="adaptory-tokenizer-") as directory:
        for name, file in {**side_files.files, "config.json": base / "config.json"}.items():
            (Path(directory) / name).symlink_to(file.absolute())
        return load_tokenizer(Path(directory))


def _bounded(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows of at most MAX_TOKENS, up to MAX_POSITIONS of them together. Raises Mismatch if there are none."""
    kept: list[Encoded] = []
    for row in rows:
        left = MAX_POSITIONS - sum(before.completion_tokens for before in kept)
        if len(row.ids) <= MAX_TOKENS and left > 0 and row.completion_tokens:
            kept.append(Encoded(row.ids[: row.prompt_tokens + left], row.prompt_tokens))
    if not kept:
        message = f"No prompt fits into the context and has from 2 to {MAX_TOKENS:,} tokens."
        raise Mismatch("no_prompts", message, subject="prompts")
    return kept


def _ids(loaded: LoadedModel, prompt: str, *, chat: bool) -> list[list[int]]:
    """The prompt as text, and as a chat."""
    return [encode_prompt(loaded, prompt, as_chat) for as_chat in ((False, True) if chat else (False,))]


def _logits(loaded: LoadedModel, rows: Sequence[Encoded], deltas: Deltas = ()) -> torch.Tensor:
    """P x V, in float32 on the CPU: the logits before each compared token of each row, in the order of the rows, with
    the deltas active."""
    by_row: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def run(batch: Sequence[int]) -> list[torch.Tensor]:
        asked = [rows[index] for index in batch]
        first = min(row.prompt_tokens for row in asked) - 1
        logits_BTV = logits_from(Prefix(loaded, ()), padded(asked).to(loaded.device), first)
        starts = [row.prompt_tokens - 1 - first for row in asked]
        return [
            logits_TV[start : start + row.completion_tokens].float().cpu()
            for logits_TV, row, start in zip(logits_BTV, asked, starts, strict=True)
        ]

    def done(batch: Sequence[int], logits: list[torch.Tensor]) -> None:
        by_row.update(zip(batch, logits, strict=True))

    run_batches(loaded, deltas, spread_batches(loaded, rows), run, done)
    return torch.cat([by_row[index] for index in range(len(rows))])


def _other_tokens(loaded: LoadedModel, expected: _ExpectedAnswers) -> str:
    """The first prompt that the result's tokenizer or template turns into other tokens; empty if none is. A template
    that writes the time makes other tokens of the base too, which says nothing about the result."""
    base = replace(loaded, tokenizer=expected.tokenizer)
    for prompt, ids in expected.ids.items():
        has_chat = len(ids) > 1
        if has_chat and loaded.tokenizer.chat_template is None:
            return "the result has no chat template."
        own = _ids(loaded, prompt, chat=has_chat)
        if own[0] != ids[0]:
            return f"its tokenizer turns {prompt[:60]!r} into other tokens."
        if own != ids and _ids(base, prompt, chat=has_chat) == ids:
            return f"its chat template renders {prompt[:60]!r} differently."
    return ""


def _compared(
    own_PV: torch.Tensor,
    expected: _ExpectedAnswers,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    reference: str,
) -> Proof:
    """Compares the result's logits. `dtypes` are those of its weights, of the reference's arithmetic and of its own."""
    coarsest = max(dtypes, key=_limit)
    limit = _limit(coarsest) * (1.0 if {torch.float32} == set(dtypes[1:]) else _ROUNDED_ACTIVATIONS)
    own_P, base_P = _distances(own_PV, expected.logits), _distances(expected.base_logits, expected.logits)
    wanted_P = expected.logits.argmax(dim=1)
    within, positions = int((own_P <= limit).sum()), len(wanted_P)
    measured = Proof(
        state="proved",
        reference=reference,
        prompts=len(expected.rows),
        positions=positions,
        equal=int((own_PV.argmax(dim=1) == wanted_P).sum()),
        within=within,
        distance=_rounded_up(float(own_P.max()), limit),
        limit=limit,
        dtype=str(coarsest).removeprefix("torch."),
        computed_in=str(expected.dtype).removeprefix("torch."),
        base_equal=int((expected.base_logits.argmax(dim=1) == wanted_P).sum()),
        base_distance=float(f"{float(base_P.median()):.1g}"),
    )
    if within < LEAST_WITHIN * positions or not isfinite(measured.distance):
        why = (
            f"the logits of {positions - within} of {positions} positions differ by more than {limit:g}, by "
            f"{float(own_P.median()):.2g} in the median; the next token is another on {positions - measured.equal}."
        )
        return replace(measured, state="failed", why=why)
    if float(base_P.median()) <= limit:
        why = "The base alone is mostly within the limit too, so these prompts do not show what the adapters change."
        return replace(measured, state="undecided", why=why)
    return measured


def _judged_by_rounding(failed: Proof, own_PV: torch.Tensor, rounded_PV: torch.Tensor | None) -> Proof:
    """Undecided if the result answers as the reference does once its weights are rounded. A mixture of experts sends
    many tokens to other experts then."""
    alike = 0 if rounded_PV is None else int((_distances(own_PV, rounded_PV) <= failed.limit).sum())
    if alike < LEAST_WITHIN * failed.positions:
        return failed
    why = f"Rounding to {failed.dtype} alone does that: so rounded, the reference is within the limit on {alike}."
    return replace(failed, state="undecided", why=why)


def _limit(dtype: torch.dtype) -> float:
    return LIMITS.get(dtype, LIMITS[torch.bfloat16])


def _distances(own_PV: torch.Tensor, wanted_PV: torch.Tensor) -> torch.Tensor:
    """|a - b| / |b| of each position, of logits minus their mean, which a softmax does not see. Infinite for values
    that are not finite."""
    own_PV, wanted_PV = (logits_PV - logits_PV.mean(dim=1, keepdim=True) for logits_PV in (own_PV, wanted_PV))
    distances_P = (own_PV - wanted_PV).norm(dim=1) / wanted_PV.norm(dim=1).clamp_min(1e-30)
    return distances_P.nan_to_num(nan=torch.inf)


def _rounded_up(distance: float, limit: float) -> float:
    """The distance to one digit, and at least a hundredth of the limit: on another processor the others differ, and the
    same recipe should make the same release."""
    if not isfinite(distance):
        return distance
    least = max(distance, limit / 100)
    step = 10.0 ** floor(log10(least))
    return float(f"{ceil(least / step) * step:.1g}")


def _dtype_of(plan: MergePlan) -> torch.dtype:
    """The dtype of most of the result's bytes."""
    sizes: Counter[str] = Counter()
    for shard in plan.shards:
        for tensor in shard.tensors:
            sizes[tensor.target.dtype] += tensor.target.size_bytes
    return TORCH_DTYPES[sizes.most_common(1)[0][0]]
