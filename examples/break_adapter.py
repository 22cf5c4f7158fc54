"""Write a broken copy of an adapter, to see a push refused: `python examples/break_adapter.py FAULT ADAPTER OUT`."""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def rename_model(tensors: Tensors) -> Tensors:
    """As saved from inside a vision-language wrapper: PEFT would load nothing from it, with only a warning."""
    return {name.replace("model.model.", "model.model.language_model.", 1): value for name, value in tensors.items()}


def put_nan(tensors: Tensors) -> Tensors:
    """One NaN in one factor, as a run that diverged leaves it."""
    name = min(tensors)
    broken = tensors[name].clone()
    broken[0, 0] = float("nan")
    return {**tensors, name: broken}


def widen(tensors: Tensors) -> Tensors:
    """Factors A for twice the inputs, as from the next larger model of the family."""
    return {name: torch.cat([value, value], dim=1) if ".lora_A." in name else value for name, value in tensors.items()}


FAULTS: dict[str, Callable[[Tensors], Tensors]] = {"prefix": rename_model, "nan": put_nan, "shape": widen}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a broken copy of an adapter.")
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists. Name another directory.")
    shutil.copytree(arguments.adapter, arguments.out)
    weights = arguments.out / "adapter_model.safetensors"
    tensors = FAULTS[arguments.fault](load_file(weights))
    save_file(tensors, weights, metadata={"format": "pt"})
    print(f"{arguments.out}: {len(tensors)} tensors, fault {arguments.fault}")


if __name__ == "__main__":
    main()
