"""One merge in its own process: `python -m benchmarks.merge_once HOW DEVICE BASE OUT ADAPTER...`.

Prints the seconds it took without imports. PEFT loads, merges and saves in bfloat16, like the checkpoint.
"""

import mmap
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COPY_BYTES = 64 << 20


def composer(device: str, base: Path, out: Path, adapters: Sequence[Path]) -> float:
    from composer.formats.checkpoints.checkpoint import open_checkpoint
    from composer.merge.plan import plan_merge
    from composer.merge.run import run_merge

    started = time.perf_counter()
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0) for adapter in adapters], device=device)
    run_merge(plan, out, device)
    return time.perf_counter() - started


def device_copy(device: str, base: Path, out: Path, adapters: Sequence[Path]) -> float:
    """Every byte of the weights from memory to the device and back, through two pinned buffers with a stream each:
    the floor of a merge on a GPU."""
    import torch

    where = torch.device(device)
    streams = [torch.cuda.Stream(where) for _ in range(2)]
    buffers = [torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in streams]
    started = time.perf_counter()
    for shard in base.glob("*.safetensors"):
        with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            weights = torch.frombuffer(mapped, dtype=torch.uint8)
            for number, piece in enumerate(weights.split(COPY_BYTES)):
                stream, buffer = streams[number % 2], buffers[number % 2][: len(piece)]
                stream.synchronize()
                buffer.copy_(piece)
                with torch.cuda.stream(stream):
                    buffer.copy_(buffer.to(where, non_blocking=True), non_blocking=True)
            torch.cuda.synchronize(where)
            piece = weights = None  # the map cannot be closed while they refer to it
    return time.perf_counter() - started


def imports(device: str, base: Path, out: Path, adapters: Sequence[Path]) -> float:
    """The cost of the process before it does anything: its imports."""
    import composer.formats.checkpoints.checkpoint
    import composer.merge.plan
    import composer.merge.run  # noqa: F401

    return 0.0


def peft_in_turn(device: str, base: Path, out: Path, adapters: Sequence[Path]) -> float:
    """Rounds to bfloat16 after each adapter."""
    return _peft(device, base, out, adapters, lambda model, names: model.merge_and_unload(adapter_names=names))


def peft_mean(device: str, base: Path, out: Path, adapters: Sequence[Path]) -> float:
    """Each adapter at the scale 1 / n, one after the other."""
    from peft.tuners.lora import LoraLayer

    def merged(model: Any, names: list[str]) -> Any:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name in set(names) & module.scaling.keys():
                    module.set_scale(name, 1 / len(names))
        return model.merge_and_unload(adapter_names=names)

    return _peft(device, base, out, adapters, merged)


def peft_ties(device: str, base: Path, out: Path, adapters: Sequence[Path]) -> float:
    """PEFT's own TIES, on the factors."""

    def merged(model: Any, names: list[str]) -> Any:
        model.add_weighted_adapter(names, [1.0] * len(names), "elected", combination_type="ties", density=0.5)
        return model.merge_and_unload(adapter_names=["elected"])

    return _peft(device, base, out, adapters, merged)


def peft_cat(device: str, base: Path, out: Path, adapters: Sequence[Path]) -> float:
    """Stacks the adapters first and rounds once."""

    def merged(model: Any, names: list[str]) -> Any:
        model.add_weighted_adapter(names, [1.0] * len(names), "stacked", combination_type="cat")
        return model.merge_and_unload(adapter_names=["stacked"])

    return _peft(device, base, out, adapters, merged)


def _peft(
    device: str, base: Path, out: Path, adapters: Sequence[Path], merged: Callable[[Any, list[str]], Any]
) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    names = [adapter.name.replace(".", "-") for adapter in adapters]  # torch allows no dot in a name
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(base, dtype=torch.bfloat16, local_files_only=True).to(device)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, adapter_name=name)
    merged(model, names).save_pretrained(out)
    if (base / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(out)
    return time.perf_counter() - started


if __name__ == "__main__":
    how = {way.__name__: way for way in (composer, device_copy, imports, peft_in_turn, peft_mean, peft_ties, peft_cat)}
    _, chosen, on, given_base, given_out, *given_adapters = sys.argv
    print(how[chosen](on, Path(given_base), Path(given_out), [Path(adapter) for adapter in given_adapters]))
