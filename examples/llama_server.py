"""llama.cpp's own HTTP server, from the package `xllamacpp`, with the options of `llama-server` that the demo uses:
`python examples/llama_server.py -m BASE.gguf --port 8100 --lora ADAPTER.gguf`."""

import argparse
import threading

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a GGUF file with llama.cpp.")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", default="base")
    parser.add_argument("--lora", action="append", default=[])
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.model_alias = given.model, given.port, {given.alias}
    params.n_ctx, params.n_parallel, params.warmup = 512, 4, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in given.lora]
    server = xllamacpp.Server(params)  # answers from threads while it is kept
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main()
