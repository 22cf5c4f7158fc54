"""Deltas that are short in another basis: FourierFT, C3A. W_OI are rows of the weight."""

import torch

from composer.delta import Delta
from composer.variants.source import Module


def fourierft(module: Module) -> list[Delta]:
    """scaling * Re ifft2(F) of a sparse F (arXiv 2405.03003), whose places torch draws on the CPU from the seed."""
    spectrum, options = module["fourierft_spectrum"], module.options
    outputs, inputs = module.size
    seed, scaling = int(options["random_loc_seed"]), float(options["scaling"])

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        drawn = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(seed))[: len(spectrum)]
        F_OI = W_OI.new_zeros(outputs * inputs)
        F_OI[drawn] = spectrum.to(W_OI)
        return scaling * torch.fft.ifft2(F_OI.view(outputs, inputs)).real

    return [module.computed(rows, reads_base=False, whole=True)]


def c3a(module: Module) -> list[Delta]:
    """Circulant blocks: entry (o, i) is the kernel's (i - o) mod b, over I (arXiv 2407.19342)."""
    kernel_PQB = module["c3a_kernel"]
    inputs, size = module.size[1], kernel_PQB.shape[2]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        row_O, column_I = torch.arange(begin, begin + len(W_OI))[:, None], torch.arange(inputs)
        picked_OI = kernel_PQB[row_O // size, column_I // size, (column_I - row_O) % size]
        return picked_OI.to(W_OI) / inputs

    return [module.computed(rows, reads_base=False)]
