"""A base in memory, adapters applied to it through hooks, and suites turned into scores.

The base's weights are never written: a set of deltas is put on and taken off in milliseconds.
Shapes: B batch, T tokens, I inputs and O outputs of a module, R rank, V vocabulary.
"""

import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from composer.delta import Computed, Delta, Layout, LowRank, Replacement
from composer.errors import InvalidFile, Mismatch, NotSupported
from composer.formats.checkpoint import Architecture, open_checkpoint
from composer.suite import Example, Suite
from composer.tensors import torch_device, torch_threads

# Padded tokens in one forward pass. On a CPU small enough that a suite of 32 examples keeps several cores busy.
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}

Deltas = Iterable[Delta]


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in memory, its tokenizer and its checkpoint's architecture."""

    model: Any  # transformers' classes are imported when a model is loaded, not for annotations
    tokenizer: Any
    architecture: Architecture

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one suite. `stderr` is over the examples, and None when there is only one."""

    suite: str
    suite_digest: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as token ids: `ids` is the prompt followed by the completion, which ends with the tokenizer's eos."""

    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """One example under one model: nats over the whole completion, its tokens, and whether greedy decoding gives it."""

    nats: float
    tokens: int
    exact: bool


def load_model(directory: Path | str, device: str = "auto", dtype: torch.dtype | None = None) -> LoadedModel:
    """Load a Hugging Face checkpoint for evaluation. No code from the checkpoint is run and nothing is downloaded.

    `device` auto is CUDA where there is one. `dtype` None is the checkpoint's own: what will be served, and on a CPU
    with AVX512-BF16 bfloat16 took 0.4 times float32's time; on one without, pass float32. Raises composer's errors for
    a checkpoint that cannot be read, and InvalidFile when transformers refuses the model or its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    directory = Path(directory)
    architecture = open_checkpoint(directory).architecture
    chosen = torch_device(device)
    # Its bar for reading weights is drawn even where stderr is no terminal.
    logging.disable_progress_bar()
    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise InvalidFile(
            "model_not_loadable",
            f"{directory}: transformers cannot load it: {error}",
            subject=str(directory),
            next_step="Evaluation needs a causal language model with its tokenizer beside it.",
        ) from error
    return LoadedModel(model.eval().to(chosen), tokenizer, architecture)


@contextmanager
def applied(model: nn.Module, deltas: Deltas) -> Iterator[None]:
    """The model with `deltas` active inside the block, several on one module adding up; its weights stay as they are.

    A low-rank delta adds scale * (x A^T) B^T to its module's output, in float32 with one rounding to the output's
    dtype. A replacement takes the parameter's place. Each acts on the module it names, so of a tied weight only on that
    side. Raises Mismatch naming a module that is missing or has another shape, NotSupported naming one of a class that
    no delta can be applied to.
    """
    low_rank: dict[str, list[LowRank]] = defaultdict(list)
    computed: dict[str, list[Computed]] = defaultdict(list)
    with ExitStack() as undo:
        for delta in deltas:
            if isinstance(delta, LowRank):
                low_rank[delta.module].append(delta)
            elif isinstance(delta, Computed):
                computed[delta.module].append(delta)
            else:
                undo.enter_context(_replaced(_module(model, delta.module), delta))
        for path, sums in computed.items():
            undo.enter_context(_computed(_module(model, path), sums))
        for path, parts in low_rank.items():
            undo.enter_context(_added(_module(model, path), parts))
        yield


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise Mismatch("module_missing", f"The model has no module {path}.", subject=path) from error


@contextmanager
def _replaced(module: nn.Module, delta: Replacement) -> Iterator[None]:
    name = delta.weight.rpartition(".")[2]
    old = module._parameters.get(name)
    if old is None or old.shape != delta.tensor.shape:
        found = "none" if old is None else f"one of shape {tuple(old.shape)}"
        wanted = f"Replacing {name} of {delta.module} with a tensor of shape {tuple(delta.tensor.shape)}"
        raise Mismatch("shape_mismatch", f"{wanted}: the model has {found}.", subject=delta.module)
    # The entry is swapped, not its values: a tied parameter is one object in two modules, and the other side stays.
    module._parameters[name] = nn.Parameter(delta.tensor.to(old), requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = old


@contextmanager
def _computed(module: nn.Module, deltas: Sequence[Computed]) -> Iterator[None]:
    """The parameter with the deltas added in float32, each taken from the base's own, in its place."""
    name = deltas[0].weight.rpartition(".")[2]
    old = module._parameters.get(name)
    (rows, columns), path = deltas[0].stored_shape, deltas[0].module
    if old is None or old.numel() != rows * columns:
        found = "none" if old is None else f"one of shape {tuple(old.shape)}"
        wanted = f"The delta of {path} is for a {name} of {rows} x {columns}"
        raise Mismatch("shape_mismatch", f"{wanted}: the model has {found}.", subject=path)
    W_MN = old.detach().reshape(rows, columns).float().cpu()
    changed = W_MN + sum(delta.rows(W_MN, 0) for delta in deltas)
    module._parameters[name] = nn.Parameter(changed.reshape(old.shape).to(old), requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = old


@contextmanager
def _added(module: nn.Module, parts: Sequence[LowRank]) -> Iterator[None]:
    path, layout = parts[0].module, parts[0].layout
    A_RI = torch.cat([part.A_RI.float() for part in parts])
    B_OR = torch.cat([part.B_OR.float() * part.scale for part in parts], dim=1)
    weight = _weight_for(module, path, layout, (B_OR.shape[0], A_RI.shape[1]))
    A_RI, B_OR = A_RI.to(weight.device), B_OR.to(weight.device)
    # Gemma's embedding scales what it looks up, and so must the part that is added.
    B_OR = B_OR * getattr(module, "embed_scale", 1.0)
    A_IR = A_RI.T.contiguous()

    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.embedding(inputs[0], A_IR) if layout is Layout.EMBEDDING else inputs[0].float() @ A_IR
        return (output.float() + nn.functional.linear(hidden, B_OR)).to(output.dtype)

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _weight_for(module: nn.Module, path: str, layout: Layout, shape: tuple[int, int]) -> torch.Tensor:
    """The module's weight, if the module is of the class that the layout says and an O x I delta of `shape` fits it."""
    classes = {Layout.LINEAR: nn.Linear, Layout.EMBEDDING: nn.Embedding}
    # transformers' Conv1D is known by its name, so that nothing is imported for models that have none.
    known = type(module).__name__ == "Conv1D" if layout is Layout.CONV1D else isinstance(module, classes[layout])
    weight = module._parameters.get("weight")
    if not known or weight is None:
        found = type(module).__name__
        raise NotSupported("module_class", f"{path} is a {found}: a {layout} delta can't be applied.", subject=path)
    stored = shape if layout is Layout.LINEAR else shape[::-1]
    if tuple(weight.shape) != stored:
        message = f"The delta of {path} is for a weight of shape {stored}, the model's is {tuple(weight.shape)}."
        raise Mismatch("shape_mismatch", message, subject=path)
    return weight


def encode(loaded: LoadedModel, example: Example, chat: bool) -> Encoded:
    """The token ids an adapter is trained and scored on: the prompt's, then the completion's and the tokenizer's eos.

    With `chat` the prompt is one user turn of the base's template. Raises Mismatch for a tokenizer without template or
    eos, and for an example longer than the model's context: cutting it would silently measure something else.
    """
    eos = loaded.tokenizer.eos_token_id
    if eos is None:
        raise Mismatch("no_eos", "The base's tokenizer has no end-of-sequence token.", subject="tokenizer")
    prompt = encode_prompt(loaded, example.prompt, chat)
    completion = loaded.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    ids = (*prompt, *completion, eos)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        message = f"An example has {len(ids)} tokens, the model's context is {limit}: {example.prompt[:60]!r}."
        raise Mismatch("example_too_long", message, subject=example.prompt[:60])
    return Encoded(ids, len(prompt))


def encode_prompt(loaded: LoadedModel, prompt: str, chat: bool) -> list[int]:
    """The prompt's token ids, at least one. Raises Mismatch for `chat` without a chat template."""
    tokenizer = loaded.tokenizer
    if not chat:
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise Mismatch(
            "no_chat_template",
            "The suite is a chat suite, and the base's tokenizer has no chat template.",
            subject="tokenizer",
            next_step="Set `chat: false` in the suite, or register the instruction-tuned base.",
        )
    else:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise Mismatch("empty_prompt", f"The prompt {prompt!r} has no tokens.", subject="tokenizer")
    return list(ids)


def measure(
    loaded: LoadedModel,
    encoded: Sequence[Encoded],
    deltas: Deltas = (),
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """One teacher-forced pass over every example, with `deltas` active, in the order given.

    Greedy decoding reproduces a completion exactly when, with the completion before it as context, every argmax is the
    reference token, eos included: so the same logits give both the loss and exact match, and nothing is generated.
    Examples of similar length share a batch of at most `batch_tokens` padded tokens; on a CPU the batches share the
    cores. `progress` gets the number of examples just done.
    """
    cores = (os.cpu_count() or 1) if loaded.device.type == "cpu" else 1
    limit = batch_tokens or BATCH_TOKENS.get(loaded.device.type, BATCH_TOKENS["cpu"])
    # A few examples are spread as well: one batch over all cores would wait at barriers.
    limit = min(limit, sum(len(one.ids) for one in encoded) // cores + 1)
    batches = list(_batches(encoded, limit))
    workers = max(1, min(cores, len(batches)))
    results: dict[int, Measured] = {}
    with (
        applied(loaded.model, deltas),
        torch_threads(max(1, (os.cpu_count() or 1) // workers)),
        ThreadPoolExecutor(workers, "measure") as pool,
    ):
        measured = pool.map(lambda batch: _measure_batch(loaded, [encoded[index] for index in batch]), batches)
        for batch, found in zip(batches, measured, strict=True):
            results |= dict(zip(batch, found, strict=True))
            if progress:
                progress(len(batch))
    return [results[index] for index in range(len(encoded))]


def _batches(encoded: Sequence[Encoded], limit: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: the largest memory is needed at once or never."""
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index].ids), index))
    while order:
        size = max(1, limit // len(encoded[order[0]].ids))
        yield order[:size]
        order = order[size:]


@torch.inference_mode()
def _measure_batch(loaded: LoadedModel, batch: Sequence[Encoded]) -> list[Measured]:
    length = max(len(one.ids) for one in batch)
    # Padding is on the right, where a causal model's earlier positions can't see it: no mask, no shifted positions.
    ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
    for row, one in enumerate(batch):
        ids_BT[row, : len(one.ids)] = torch.tensor(one.ids)
    ids_BT = ids_BT.to(loaded.device)
    first = min(one.prompt_tokens for one in batch) - 1
    logits_BTV = _logits_from(loaded.model, ids_BT, first)
    measured: list[Measured] = []
    for row, one in enumerate(batch):
        start = one.prompt_tokens - 1 - first
        logits_TV = logits_BTV[row, start : start + one.completion_tokens].float()
        target_T = ids_BT[row, one.prompt_tokens : len(one.ids)]
        nats = nn.functional.cross_entropy(logits_TV, target_T, reduction="sum").item()
        exact = bool((logits_TV.argmax(dim=-1) == target_T).all())
        measured.append(Measured(nats, one.completion_tokens, exact))
    return measured


def _logits_from(model: Any, ids_BT: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of positions `first` to the last but one: the head is the largest matrix, and prompts need none of it."""
    kept = torch.arange(first, ids_BT.shape[1] - 1, device=ids_BT.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept).logits
    return model(input_ids=ids_BT, use_cache=False).logits[:, kept]


def evaluate(
    loaded: LoadedModel,
    suite: Suite,
    deltas: Deltas = (),
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The suite's scores with `deltas` active: `nll` in nats per completion token, `accuracy` the share that is exact.

    With `limit`, of `suite.sample(limit)`. nll is total nats over total tokens, with the standard error of a ratio
    estimator; accuracy has the binomial one. The same input gives the same scores, whatever else shares a batch, up to
    float rounding.
    """
    encoded = [encode(loaded, example, suite.chat) for example in suite.sample(limit)]
    measured = measure(loaded, encoded, deltas, progress=progress)
    n = len(measured)
    nll, nll_stderr = ratio([one.nats for one in measured], [one.tokens for one in measured])
    accuracy = sum(one.exact for one in measured) / n
    accuracy_stderr = sqrt(accuracy * (1 - accuracy) / n) if n > 1 else None
    return [
        Score(suite.name, suite.digest, "nll", nll, nll_stderr, n, higher_is_better=False),
        Score(suite.name, suite.digest, "accuracy", accuracy, accuracy_stderr, n, higher_is_better=True),
    ]


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


@torch.inference_mode()
def generate(loaded: LoadedModel, prompt: str, chat: bool = True, deltas: Deltas = (), max_new_tokens: int = 64) -> str:
    """The greedy completion of a prompt with `deltas` active, without special tokens."""
    prompt_ids = torch.tensor([encode_prompt(loaded, prompt, chat)], device=loaded.device)
    with applied(loaded.model, deltas):
        ids = loaded.model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=False,
            # What a checkpoint's generation_config may set, and greedy decoding must not have.
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            eos_token_id=loaded.tokenizer.eos_token_id,
            pad_token_id=loaded.tokenizer.eos_token_id,
        )
    return loaded.tokenizer.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)
