"""The result of a placement: modules on the base tensors that they act on, and findings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from composer.findings import Finding, Severity
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.placement.naming import Target, elsewhere, find_weight, is_head
from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.header import Header
from composer.formats.checkpoints.renames import made_by

# transformers' models built with Conv1D, which stores W as inputs x outputs.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
# Models whose embedding has a norm, which neither of PEFT's ways to train an embedding applies.
NORMED_EMBEDDINGS = frozenset(
    {"inkling_text", "inkling_mm_model", "muse_glimmer", "muse_glimmer_text", "muse_spark", "muse_spark_text"}
)
OTHER_PATHS = "other_paths"
GROUPED = "grouped_convolution"
LOW_RANK_KINDS = frozenset({"linear", "conv1d", "embedding", "convolution"})
FULL_KINDS = frozenset({"replacement", "base_copy"})


@dataclass(frozen=True, slots=True)
class Piece:
    """Outputs [first, last) of one expert of a fused stack, and their stored rows, from `begin` of `weight` on: of the
    stack itself, or of the expert's own tensor if the checkpoint is not fused."""

    expert: int
    weight: str
    begin: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModule:
    """A module of the adapter and the checkpoint tensor `weight` that it acts on.

    `kind` is linear, conv1d, embedding or convolution (a low-rank pair); experts (a pair for each expert of a stack;
    `module` is the parameter's path); block_diagonal and kasa (variants of a pair); other (another type's delta);
    tokens (rows of an embedding); bias (the effect of the module's parts on its bias); replacement (a tensor saved in
    full); or base_copy (PEFT's copy of a base weight beside an adapted embedding).

    `parts` maps lora_A, lora_B, magnitude, … or a parameter's name to the key in the file. `shape` is the base
    tensor's, as stored; 0 if unknown. Rank, alpha and scale are 0 without a low-rank pair. `layout` is that of a delta.
    `twin`: the other side of a tied tensor has the same delta. `nested`: PEFT wraps the module inside of its attention.
    """

    module: str
    weight: str
    kind: str
    tied: bool
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    rank: int = 0
    alpha: float = 0.0
    scale: float = 0.0
    rule: str = ""
    layout: str = "linear"
    pieces: tuple[Piece, ...] = ()
    twin: bool = False
    nested: bool = False


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """The placed modules, and the findings of the placement."""

    modules: list[PlacedModule]
    findings: list[Finding]

    @property
    def low_rank(self) -> list[PlacedModule]:
        return [module for module in self.modules if module.kind in LOW_RANK_KINDS]

    @property
    def adapted(self) -> list[PlacedModule]:
        """Modules whose weight gets a delta of any form, with what happens to their bias."""
        return [module for module in self.modules if module.kind not in FULL_KINDS and module.kind != "bias"]


@dataclass
class Placement:
    """A placement in progress."""

    config: AdapterConfig
    header: Header
    architecture: Architecture | None
    modules: list[PlacedModule] = field(default_factory=list[PlacedModule])
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def model_type(self) -> str:
        return "" if self.architecture is None else self.architecture.model_type

    def error(self, code: str, subject: str, message: str) -> None:
        """The subject of a finding; a key without a module, such as `lora_A`, is one too."""
        self.findings.append(Finding(code, Severity.ERROR, subject or "(no module)", message))

    def shape(self, key: str) -> tuple[int, ...]:
        return self.header.tensors[key].shape

    def base_shape(self, target: Target) -> tuple[int, ...]:
        return () if self.architecture is None else self.architecture.tensors[target.weight].shape

    def find(self, module: str, parameter: str, key: str) -> Target | None:
        """The parameter's tensor on disk. Adds a finding and returns None unless exactly one tensor matches."""
        if self.architecture is None:
            return Target(f"{module}.{parameter}", False)
        target = find_weight(module, parameter, self.architecture)
        if isinstance(target, Target):
            self._note_elsewhere(module, target, self.architecture)
            return target
        if target:
            what = f"could be any of {', '.join(target)}"
            self.error("unmatched_tensor", module or key, f"{key}: {module}.{parameter} {what}.")
        else:
            self.not_found(module, parameter, key)
        return None

    def not_found(self, module: str, parameter: str, key: str) -> None:
        """A finding for a path that is not a tensor of the base, or only a part of one."""
        path = f"{module}.{parameter}"
        if how := made_by(self.model_type, path):
            message = (
                f"{path} is not a tensor on disk: transformers {how} as it loads {self.model_type}. Merge it with PEFT."
            )
            self.error("unsupported_layer", module, message)
        else:
            cause = self.renamed_perhaps([module])
            self.error("unmatched_tensor", module or key, f"{key}: {path} is not a tensor of the base.{cause}")

    @cached_property
    def _called(self) -> set[str]:
        """All components of the base's names."""
        tensors = () if self.architecture is None else self.architecture.tensors
        return {part for name in tensors for part in name.split(".")}

    def renamed_perhaps(self, modules: Iterable[str]) -> str:
        """The likely cause if the base has no module with one of these names: they may not be in-memory names."""
        names = {module.rpartition(".")[2] for module in modules}
        if not names or names & self._called:
            return ""
        return (
            f" It has nothing named {', '.join(sorted(names))}: if transformers renames modules of "
            f"{self.model_type or 'this model'}, this version does not know the renaming, but PEFT can merge the "
            "adapter."
        )

    def _note_elsewhere(self, module: str, target: Target, architecture: Architecture) -> None:
        if any(finding.code == OTHER_PATHS for finding in self.findings) or not elsewhere(target, architecture):
            return
        message = f"{module} is {target.weight.rpartition('.')[0]} in the base ({target.rule}): no server looks there."
        self.findings.append(Finding(OTHER_PATHS, Severity.WARNING, module, message))

    def fits(self, subject: str, target: Target, shape: tuple[int, ...]) -> bool:
        """Whether the shape matches the target in the base. True without a base; a mismatch is recorded as an error."""
        expected = self.base_shape(target)
        if self.architecture is None or shape == expected:
            return True
        message = f"{subject} is made for {shape_text(shape)}; the base's {target.weight} is {shape_text(expected)}."
        self.error("shape_mismatch", subject, message)
        return False

    def transposed(self, module: str, target: Target, size: tuple[int, int]) -> bool:
        """Whether the weight is stored as inputs x outputs. The model type decides, since a square weight looks the
        same both ways. `size` is (O, I)."""
        if is_head(module):
            return False
        if self.architecture is None:
            return self.config.fan_in_fan_out
        if self.model_type in CONV1D_MODELS:
            return True
        return self.config.fan_in_fan_out and self.base_shape(target) == size[::-1] != size


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def bias_of(target: Target, outputs: int) -> dict[str, Any]:
    """The placement of a module's parts on its bias, which no other module shares."""
    own = {"weight": target.weight, "kind": "bias", "shape": (outputs,), "layout": "linear"}
    return own | {"tied": False, "twin": False}
