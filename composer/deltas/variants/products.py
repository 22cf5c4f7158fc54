"""Deltas from products of small tensors: AdaLoRA, DeLoRA, GraLoRA and MiSS are low-rank; LoHa and LoKr are not.

Shapes: O outputs, I inputs, R rank, G blocks of GraLoRA.
"""

import torch

from composer.deltas.delta import Delta
from composer.deltas.variants.source import ModuleParts, Read


def adalora(module: ModuleParts) -> list[Delta]:
    """s B (E * A), s = alpha / (init_r + 1e-5) (arXiv 2303.10512). A module whose budget fell to 0 adds nothing."""
    A_RI, E_R1 = module.value("lora_A"), module.value("lora_E")
    if not len(A_RI):
        return []
    rank = module.config.rank
    alpha = module.config.alpha if module.config.alpha > 0 else rank
    return [module.low_rank(A_RI * E_R1, module.value("lora_B"), alpha / (rank + 1e-5))]


def delora(module: ModuleParts) -> list[Delta]:
    """B diag(lambda / (R |A_r| |B_r|)) A, each input scaled by the norm its weights had (arXiv 2503.18225)."""
    A_RI, B_OR = module.value("delora_A"), module.value("delora_B")
    norms_R = (A_RI.norm(dim=1).clamp(min=1e-4) * B_OR.norm(dim=0).clamp(min=1e-4))[:, None]
    scaled_RI = A_RI * (module.value("delora_lambda") / len(A_RI) / norms_R) * module.value("delora_w_norm")
    return [module.low_rank(scaled_RI, B_OR)]


def gralora(module: ModuleParts) -> list[Delta]:
    """Block (j, n) is A[n]'s j-th share of the rank times B[j]'s n-th (arXiv 2505.20355): total rank G R, plus a plain
    pair; s = alpha / (R + hybrid_r)."""
    A_GIR, B_GRO = module.value("gralora_A"), module.value("gralora_B")
    blocks, rank = A_GIR.shape[0], A_GIR.shape[2]
    # One direction for each (input block n, output block j, q); zero outside its blocks.
    inner, outer = A_GIR.unflatten(2, (blocks, -1)), B_GRO.unflatten(1, (blocks, -1))
    A_RI = torch.block_diag(*(own.permute(1, 2, 0).flatten(0, 1) for own in inner))
    B_RO = torch.stack([torch.block_diag(*outer[:, n]) for n in range(blocks)]).flatten(0, 1)
    hybrid = int(module.options["hybrid_r"])
    if hybrid:
        A_RI = torch.cat([A_RI, module.value("gralora_A_general")])
        B_RO = torch.cat([B_RO, module.value("gralora_B_general").T])
    return [module.low_rank(A_RI, B_RO.T, module.config.alpha / (rank + hybrid))]


def miss(module: ModuleParts) -> list[Delta]:
    """Input i gets row i mod R of the block (arXiv 2409.15371). `mini` repeats the block along the outputs; `bat` also
    adds W's own blocks times it."""
    if module.options["init_weights"] == "bat":
        return _bat(module)
    block_RO = module.value("miss_block")
    outputs, inputs = module.size
    rank = len(block_RO)
    select_RI = torch.eye(rank, dtype=block_RO.dtype).repeat(1, inputs // rank + 1)[:, :inputs]
    return [module.low_rank(select_RI, block_RO.repeat(1, outputs // block_RO.shape[1]).T)]


def _bat(module: ModuleParts) -> list[Delta]:
    block_PRR = module.value("miss_block")
    rank = block_PRR.shape[1]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        row_O = torch.arange(begin, begin + len(W_OI))
        own_ORR = block_PRR[row_O // rank].to(W_OI)
        parts_OKR = W_OI.unflatten(1, (-1, rank))
        added_OR = own_ORR[torch.arange(len(W_OI)), row_O % rank]
        return (torch.einsum("okr,ors->oks", parts_OKR, own_ORR) + added_OR[:, None]).flatten(1)

    return [module.computed(rows)]


def loha(module: ModuleParts) -> list[Delta]:
    """s (w1_a w1_b) * (w2_a w2_b), element by element, s = alpha / R (arXiv 2108.06098); a convolution may have a core
    t between the two."""
    scale = module.config.scale_for(module.placed.module)

    def product(one: str, own: slice, like: torch.Tensor) -> torch.Tensor:
        a, b = (module[f"hada_w{one}_{side}"].to(like) for side in "ab")
        if f"hada_t{one}" not in module:
            return a[own] @ b
        return torch.einsum("ij...,jr,ip->pr...", module[f"hada_t{one}"].to(like), b, a[:, own]).flatten(1)

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        own = slice(begin, begin + len(W_OI))
        return scale * product("1", own, W_OI) * product("2", own, W_OI)

    return [module.computed(rows, reads_base=False)]


def lokr(module: ModuleParts) -> list[Delta]:
    """s kron(w1, w2), s = alpha / R whatever w1 and w2 are made of, as in PEFT (arXiv 2309.14859)."""
    scale = module.config.scale_for(module.placed.module)

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        w1, w2 = _kronecker(module, "lokr_w1", W_OI), _kronecker(module, "lokr_w2", W_OI)
        row_O = torch.arange(begin, begin + len(W_OI))
        if w2.dim() == 3:  # Conv1d: PEFT's kron treats w1 as 1 x ..., so training does too
            left, right = w1[row_O % len(w1)], w2[row_O // len(w1)]
            return scale * (left[:, None, :, None] * right[:, :, None, :]).flatten(1)
        w2 = w2.flatten(1)
        left, right = w1[row_O // len(w2)], w2[row_O % len(w2)]
        return scale * (left[:, :, None] * right[:, None, :]).flatten(1)

    return [module.computed(rows, reads_base=False)]


def _kronecker(module: ModuleParts, name: str, like: torch.Tensor) -> torch.Tensor:
    """One side of the product, in the dtype and on the device of `like`."""
    if name in module:
        return module.value(name).to(like)
    one, other = (module.value(f"{name}_{side}").to(like.device) for side in "ab")
    if name == "lokr_w2" and "lokr_t2" in module:
        core = module.value("lokr_t2").to(like.device)
        return torch.einsum("ij...,ip,jr->pr...", core, one, other).to(like)
    return (one @ other).to(like)


READERS: dict[str, Read] = {
    "ADALORA": adalora,
    "LOHA": loha,
    "LOKR": lokr,
    "DELORA": delora,
    "GRALORA": gralora,
    "MISS": miss,
}
"""The adapter types of this family."""
