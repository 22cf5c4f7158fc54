"""Adapters written by hand, so that a test knows every number in them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from composer.formats.adapters.inspection import Inspection, inspect

Factors = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""(A, B) of one module: R x I and O x R."""


def write_adapter(
    directory: Path,
    modules: Mapping[str, Factors],
    *,
    dtype: torch.dtype = torch.float64,
    full: Mapping[str, npt.NDArray[np.float64]] | None = None,
    **config: object,
) -> Inspection:
    """`modules` maps module paths to factors, `full` maps parameters to tensors that are saved in full."""
    directory.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module, (A, B) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.from_numpy(A).to(dtype).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.from_numpy(B).to(dtype).contiguous()
        ranks[module] = A.shape[0]
    for name, tensor in (full or {}).items():
        tensors[f"base_model.model.{name}"] = torch.from_numpy(tensor).to(dtype).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")
    rank = max(ranks.values())
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "rank_pattern": ranks, **config}
    (directory / "adapter_config.json").write_text(json.dumps(stated))
    return inspect(directory, None)


def random_factors(seed: int, outputs: int = 24, inputs: int = 17, rank: int = 3) -> Factors:
    random = np.random.default_rng(seed)
    return random.standard_normal((rank, inputs)), random.standard_normal((outputs, rank))


def factors_of(sigma: list[float], outputs: int = 40, inputs: int = 30) -> Factors:
    """Factors whose product has exactly these singular values, with a random change of basis between them."""
    random = np.random.default_rng(len(sigma))
    rank = len(sigma)
    U = np.linalg.qr(random.standard_normal((outputs, rank)))[0]
    V = np.linalg.qr(random.standard_normal((inputs, rank)))[0]
    mix = random.standard_normal((rank, rank)) + 3 * np.eye(rank)
    return np.linalg.inv(mix) @ V.T, U @ np.diag(sigma) @ mix


def dense(seen: Inspection, module: str, factors: Factors) -> npt.NDArray[np.float64]:
    scale = next(placed.scale for placed in seen.placed.low_rank if placed.module == module)
    return scale * factors[1] @ factors[0]
