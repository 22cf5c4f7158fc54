"""Adapters as local files: read, check, combine, merge and evaluate them. Knows nothing of the registry.

formats/    reads checkpoints and adapters of every layout, without torch: headers, configs, facts, servers
variants/   what each type of adapter adds to a weight: a Delta (delta.py)
methods/    several adapters' deltas become one list of deltas
combine     … written as one PEFT adapter (adapter.py); convert.py does it for another tool's layout
inputs      what a note says of the adapters that something was made of; files.py reads what a user names
merge/      … added to a checkpoint: planned, streamed, verified, resumed, rebuilt
conflicts/  what adapters would do to each other, from their factors, activations or a probe
evaluate    suites become scores of a base (model.py) with deltas active (applied.py)
"""
