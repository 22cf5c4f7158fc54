"""Computes the common beginning of all examples, such as a chat template's system prompt, only once.

A causal model's keys and values of a prefix do not depend on what follows. Shapes: B examples of a batch.
"""

import inspect
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import takewhile
from threading import Lock
from typing import Any

import torch

from composer.evaluation.model import LoadedModel

# A pass over a prefix costs at least reading the weights once. It must save this many tokens of other passes.
_WORTHWHILE_TOKENS = {"cpu": 32, "cuda": 8192}


@dataclass(slots=True)
class Prefix:
    """The first token ids of every example, at least one token before the first that is scored; possibly none."""

    loaded: LoadedModel
    ids: tuple[int, ...]
    _cache: Any = None
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, loaded: LoadedModel, prompts: Sequence[tuple[int, ...]]) -> "Prefix":
        """The longest prefix of all prompts that leaves a token of each, if computing it once is worthwhile."""
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        shared = tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns))
        saved = len(shared) * (len(prompts) - 1)
        worthwhile = saved >= _WORTHWHILE_TOKENS.get(loaded.device.type, _WORTHWHILE_TOKENS["cuda"])
        return cls(loaded, shared if worthwhile and _has_plain_cache(loaded) else ())

    def arguments(self, count: int) -> dict[str, Any]:
        """The arguments of a forward pass over what follows the prefix in `count` examples. The prefix is run at the
        first call, with the deltas that are active then."""
        if not self.ids:
            return {"use_cache": False}
        with self._lock:  # batches run side by side
            if self._cache is None:
                self._cache = self._computed()
        cache = copy(self._cache)
        cache.layers = [copy(layer) for layer in self._cache.layers]  # a layer replaces its tensors, never changes them
        cache.batch_repeat_interleave(count)
        return {_argument(self.loaded.model): cache, "use_cache": True}

    @torch.inference_mode()
    def _computed(self) -> Any:
        model, cache = self.loaded.model, _new_cache(self.loaded.model)
        ids_1T = torch.tensor([self.ids], device=self.loaded.device)
        kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        model(input_ids=ids_1T, use_cache=True, **{_argument(model): cache}, **kept)
        return cache


def _argument(model: Any) -> str:
    """The name of the argument for a cache: `past_key_values` until transformers 5.20 or so."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _new_cache(model: Any) -> Any:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config)


def _has_plain_cache(loaded: LoadedModel) -> bool:
    """Whether a later token needs only keys and values of earlier ones, and each layer has its own. Not with
    recurrent layers, which have a state, and not with positions that are encoded by the length of the whole text. Where
    weights are read from the disk, a pass costs more than the tokens that it saves."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    config = loaded.model.config.get_text_config(decoder=True)
    by_length = {"dynamic", "longrope"} & set(_values(getattr(config, "rope_parameters", None)))
    if loaded.streamed or by_length or getattr(loaded.model, "_is_stateful", False):
        return False
    layers = _new_cache(loaded.model).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return plain and len(layers) == config.num_hidden_layers


def _values(settings: Any) -> list[str]:
    """All texts in the settings, which may be nested by type of layer."""
    if isinstance(settings, dict):
        return [text for value in settings.values() for text in _values(value)]
    return [settings] if isinstance(settings, str) else []
