"""Throughput of a base's identity against `sha256sum`: both hash a synthetic checkpoint of a gigabyte in the page
cache.

`sha256sum` reads the same files, one process per core; it hashes whole files, we hash each tensor.
"""

import json
import os
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import harness
from benchmarks.harness import Case, Sample
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint

SHARDS, LAYERS, WIDTH = 8, 32, 2_048
FLOOR = "sha256sum, parallel"


def main() -> None:
    chosen = harness.options(__doc__, rounds=9)
    harness.announce("hashing")
    with TemporaryDirectory(prefix="bench-hashing-") as directory:
        base = Path(directory)
        size = write_checkpoint(base, 2 if chosen.quick else LAYERS)
        shards = sorted(base.glob("*.safetensors"))
        print(f"{size / harness.MB:.0f} MB in {len(shards)} shards, in the page cache; {os.cpu_count()} cores")
        workers = os.cpu_count() or 1
        command = ["sh", "-c", f'printf "%s\\0" "$@" | xargs -0 -n1 -P{workers} sha256sum > /dev/null', "sh", *shards]
        checkpoint = open_checkpoint(base)
        cases: dict[str, Case] = {
            FLOOR: lambda: harness.process(command),
            "hash_checkpoint": lambda: harness.calls(lambda: hash_checkpoint(checkpoint), 1),
        }
        results = harness.interleave(cases, chosen.rounds)
    seconds = {name: [sample.seconds for sample in samples] for name, samples in results.items()}
    plain = {name: [Sample(value) for value in values] for name, values in seconds.items()}
    harness.report("Hashing a base", plain, FLOOR)
    shares = [one / other for one, other in zip(seconds[FLOOR], seconds["hash_checkpoint"], strict=True)]
    rates = [size / value / harness.MB for value in seconds["hash_checkpoint"]]
    print(f"\n{harness.spread(rates)} MB/s, {harness.spread(shares)} of the throughput of {FLOOR}")


def write_checkpoint(directory: Path, layers: int) -> int:
    """Writes shards of random bytes with headers like those of transformers; returns the bytes of all tensors."""
    matrix, total, weight_map = WIDTH * WIDTH * 2, 0, {}
    block = os.urandom(matrix)
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        tensors = [f"model.layers.{layer}.{part}.weight" for layer in range(shard, layers, SHARDS) for part in "abcd"]
        for number, tensor in enumerate(tensors):
            offsets = [number * matrix, (number + 1) * matrix]
            header[tensor] = {"dtype": "BF16", "shape": [WIDTH, WIDTH], "data_offsets": offsets}
            weight_map[tensor] = name
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with closing((directory / name).open("wb")) as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for number in range(len(tensors)):
                file.write(number.to_bytes(8, "little") + block[8:])
        total += len(tensors) * matrix
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


if __name__ == "__main__":
    main()
