"""Deltas of few numbers, in another basis or at sparse positions: FourierFT, C3A, Super-Tuning, SHiRA. W_OI are rows
of the weight."""

import torch

from composer.deltas.delta import Delta
from composer.deltas.variants.source import ModuleParts, Read


def fourierft(module: ModuleParts) -> list[Delta]:
    """scaling * Re ifft2(F) of a sparse F (arXiv 2405.03003), whose positions torch draws on the CPU from the seed."""
    spectrum, options = module["fourierft_spectrum"], module.options
    outputs, inputs = module.size
    seed, scaling = int(options["random_loc_seed"]), float(options["scaling"])

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        drawn = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(seed))[: len(spectrum)]
        F_OI = W_OI.new_zeros(outputs * inputs)
        F_OI[drawn] = spectrum.to(W_OI)
        return scaling * torch.fft.ifft2(F_OI.view(outputs, inputs)).real

    return [module.computed(rows, reads_base=False, all_rows=True)]


def c3a(module: ModuleParts) -> list[Delta]:
    """Circulant blocks: entry (o, i) is the kernel's (i - o) mod b, over I (arXiv 2407.19342)."""
    kernel_PQB = module["c3a_kernel"]
    inputs, size = module.size[1], kernel_PQB.shape[2]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        row_O, column_I = torch.arange(begin, begin + len(W_OI))[:, None], torch.arange(inputs)
        picked_OI = kernel_PQB[row_O // size, column_I // size, (column_I - row_O) % size]
        return picked_OI.to(W_OI) / inputs

    return [module.computed(rows, reads_base=False)]


def supertuning(module: ModuleParts) -> list[Delta]:
    """Values at chosen positions of the flat weight, plus s B A if there is a rank (arXiv 2607.09287)."""
    (outputs, inputs), options = module.size, module.options
    positions, values = module.indices("supertuning_indices", outputs * inputs), module["supertuning_values"]
    rank = int(options["r"])
    # PEFT's own default, which its config contains.
    scale = (float(options["lora_alpha"]) or 2.0 * rank) / rank if rank else 0.0

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        delta_OI = _scattered(positions, values, W_OI, begin)
        if rank:
            A_RI, B_OR = (module[f"supertuning_lora_{side}"].to(W_OI) for side in "AB")
            delta_OI.addmm_(B_OR[begin : begin + len(W_OI)], A_RI, alpha=scale)
        return delta_OI

    return [module.computed(rows, reads_base=False)]


def shira(module: ModuleParts) -> list[Delta]:
    """Values at saved (row, column) positions (arXiv 2406.13175)."""
    outputs, inputs = module.size
    rows_K = module.indices("shira_indices", outputs, slice(0, 1))[0]
    columns_K = module.indices("shira_indices", inputs, slice(1, 2))[0]
    positions, values = rows_K * inputs + columns_K, module["shira_weight"]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        return _scattered(positions, values, W_OI, begin)

    return [module.computed(rows, reads_base=False)]


def _scattered(positions: torch.Tensor, values: torch.Tensor, W_OI: torch.Tensor, begin: int) -> torch.Tensor:
    """The rows of W_OI with `values` at `positions` of the flat weight, and zeros elsewhere."""
    columns = W_OI.shape[1]
    first, last = begin * columns, (begin + len(W_OI)) * columns
    own = (positions >= first) & (positions < last)
    delta_OI = torch.zeros(W_OI.shape, dtype=W_OI.dtype, device=W_OI.device)
    delta_OI.view(-1).index_add_(0, (positions[own] - first).to(W_OI.device), values[own].to(W_OI))
    return delta_OI


READERS: dict[str, Read] = {
    "FOURIERFT": fourierft,
    "C3A": c3a,
    "SUPERTUNING": supertuning,
    "SHIRA": shira,
}
"""The adapter types of this family."""
