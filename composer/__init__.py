"""Adapters as local files: read, check, combine, merge and evaluate them. Knows nothing of the registry.

optimize/    the combination of adapters that keeps most of each, found by a race and confirmed
conflicts/   what adapters would do to each other: evidence, report, and its texts and pages
merge/       deltas added to a checkpoint: planned, streamed, verified, resumed, rebuilt
export/      deltas written as one PEFT adapter, of several adapters, of another layout, or of a fine-tuned checkpoint
evaluation/  suites become scores of a base with deltas active
methods/     several adapters' deltas become one list of deltas
deltas/      what each type of adapter adds to a weight
checks/      whether adapters and a base belong together: one check for every command, without torch
formats/     checkpoints, adapters and recipes as files, without torch
"""
