"""A set's members as the configuration of routers that compare embeddings of example prompts.

vLLM's semantic router (config.yaml, version v0.3: routing.signals.embeddings) and LiteLLM's auto router
(auto_router_config) have encoders of their own and need examples, which a set does not have: the caller gives them.
Neither chooses as the set's own router does, and thresholds are those of the projects' examples.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from composer.errors import Mismatch
from composer.formats.sets.adapter_set import AdapterSet
from composer.formats.sets.router import BASE

Prompts = Mapping[str, Sequence[str]]
"""Example prompts by member, perhaps with some for the base."""
VLLM_THRESHOLD, LITELLM_THRESHOLD = 0.75, 0.5
LITELLM_EMBEDDING = "text-embedding-3-large"
_UNMEASURED = (
    "# Thresholds are those of the project's examples and were not measured: try them on prompts of your own.\n"
)


def to_vllm(made: AdapterSet, name: str, prompts: Prompts, base: str) -> str:
    """The part `routing` of vLLM's semantic router: a decision for each member of the set `name`, by the embedding
    signal that its examples match best. What matches none gets the router's default model."""
    served = _served(made, prompts)
    signals = [
        {"name": part, "threshold": VLLM_THRESHOLD, "aggregation_method": "max", "candidates": list(given)}
        for part, given in prompts.items()
    ]
    decisions = [
        {
            "name": part,
            "description": f"Prompts of {part} in {name}.",
            "priority": 100,
            "rules": {"operator": "AND", "conditions": [{"type": "embedding", "name": part}]},
            "modelRefs": [{"model": base, "use_reasoning": False, **({"lora_name": lora} if lora else {})}],
            "algorithm": {"type": "static"},
        }
        for part, lora in served.items()
        if part in prompts
    ]
    loras = [{"name": lora, "description": f"Prompts of {part}."} for part, lora in served.items() if lora]
    routing: dict[str, Any] = {"modelCards": [{"name": base, "loras": loras}], "signals": {"embeddings": signals}}
    if BASE in prompts:  # the only class that may get what matches nothing
        partition = {"name": "members", "semantics": "exclusive", "temperature": 0.3}
        routing["projections"] = {"partitions": [{**partition, "members": list(prompts), "default": BASE}]}
    return _UNMEASURED + _yaml({"routing": {**routing, "decisions": decisions}})


def to_litellm(made: AdapterSet, name: str, prompts: Prompts, base: str) -> str:
    """LiteLLM's `model_list` with an auto router called as the set, its members and the base, for servers of vLLM."""
    served = _served(made, prompts)
    routes = [
        {
            "name": served[part] or base,
            "utterances": list(given),
            "description": f"Prompts of {part}.",
            "score_threshold": LITELLM_THRESHOLD,
        }
        for part, given in prompts.items()
    ]
    auto = {
        "model": f"auto_router/{name}",
        "auto_router_config": json.dumps({"routes": routes}, ensure_ascii=False),
        "auto_router_default_model": base,
        "auto_router_embedding_model": LITELLM_EMBEDDING,
    }
    rows = [{"model_name": name, "litellm_params": auto}]
    models = (*(lora for lora in served.values() if lora), base)
    rows += [{"model_name": model, "litellm_params": {"model": f"hosted_vllm/{model}"}} for model in models]
    return _UNMEASURED + _yaml({"model_list": rows})


FORMS: Mapping[str, Callable[[AdapterSet, str, Prompts, str], str]] = {
    "vllm-semantic-router": to_vllm,
    "litellm": to_litellm,
}


def _served(made: AdapterSet, prompts: Prompts) -> dict[str, str]:
    """The name of each class's adapter as `adaptory mirror` loads it; an empty one for the base. Raises Mismatch for a
    member without examples, and for examples of no member."""
    served = {part: f"{member.repository}@{member.version}" for part, member in made.members.items()}
    known = ", ".join((*served, BASE))
    for part in (*served, *prompts):
        if part not in {*served, BASE} or not prompts.get(part):
            is_known = part in {*served, BASE}
            message = f"{part} has no example prompts." if is_known else f"The set has no member {part}: {known}."
            raise Mismatch("router_examples", message, subject=part)
    return {**served, BASE: ""}


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100_000)
