"""Deltas from projections or a bank that all modules share: VeRA, PVeRA, RandLoRA, VB-LoRA, Uni-LoRA.

Shapes: O outputs, I inputs, R rank, K bases of RandLoRA; T tiles, L the length of a vector in VB-LoRA's bank.
"""

import torch

from composer.deltas.delta import Delta
from composer.deltas.variants.source import ModuleParts, Read


def vera(module: ModuleParts) -> list[Delta]:
    """diag(b) B diag(d) A, cut from the shared A and B (arXiv 2310.11454). For PVeRA, the mean half of d and A."""
    prefix = "pvera_" if "pvera_A" in module else "vera_"
    outputs, inputs = module.size
    B_OR = module.value(f"{prefix}B")[:outputs]
    rank = B_OR.shape[1]
    A_RI = module.value(f"{prefix}lambda_d")[:rank, None] * module.value(f"{prefix}A")[:rank, :inputs]
    return [module.low_rank(A_RI, module.value(f"{prefix}lambda_b")[:, None] * B_OR)]


def randlora(module: ModuleParts) -> list[Delta]:
    """s Σ_k B_k diag(lambda_k) A_k diag(gamma_k), transposed if O < I (arXiv 2502.00987). It has full rank, so rows are
    computed. A and B are flattened over rank and bases in different orders, as in PEFT."""
    lambda_RK, gamma_KS = module["randlora_lambda"], module["randlora_gamma"]
    A_R1S, B_LKR = module["randlora_A"], module["randlora_B"]
    outputs, inputs = module.size
    smaller, larger, bases = min(outputs, inputs), max(outputs, inputs), len(gamma_KS)
    scale = module.config.scale_for(module.placed.module)

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        own = slice(begin, begin + len(W_OI))
        A_RKS = A_R1S[:, :, :smaller].to(W_OI) * lambda_RK[:, :, None].to(W_OI) * gamma_KS.to(W_OI)
        A_DS, B_LD = A_RKS.flatten(0, 1), B_LKR[:larger, :bases].to(W_OI).flatten(1)
        return scale * (B_LD[own] @ A_DS if smaller == inputs else A_DS.T[own] @ B_LD.T)

    return [module.computed(rows, reads_base=False)]


def vblora(module: ModuleParts) -> list[Delta]:
    """B A from tiles that mix a few vectors of the bank (arXiv 2405.15179)."""
    A_RTL, B_TRL = _mixed(module, "vblora_logits_A"), _mixed(module, "vblora_logits_B")
    return [module.low_rank(A_RTL.flatten(1), B_TRL.transpose(1, 2).flatten(0, 1))]


def _mixed(module: ModuleParts, name: str) -> torch.Tensor:
    bank_VL = module.value("vblora_vector_bank")
    if name in module:
        best, indices = module.value(name).topk(int(module.options["topk"]), dim=-1)
        weights = best.softmax(dim=-1)
    else:
        indices = module.indices(f"{name}_topk_indices", len(bank_VL))
        most = module.value(f"{name}_topk_weights")
        weights = torch.cat([most, 1 - most.sum(dim=-1, keepdim=True)], dim=-1)
    return (weights[..., None] * bank_VL[indices]).sum(dim=-2)


def unilora(module: ModuleParts) -> list[Delta]:
    """B A whose entries are picked from one vector and scaled (arXiv 2506.00799)."""
    theta = module.value("unilora_theta_d")
    A_RI, B_OR = (
        theta[module.indices(f"unilora_indices_{side}", len(theta))] * module.value(f"unilora_scales_{side}")
        for side in "AB"
    )
    return [module.low_rank(A_RI, B_OR)]


READERS: dict[str, Read] = {
    "VERA": vera,
    "PVERA": vera,
    "RANDLORA": randlora,
    "VBLORA": vblora,
    "UNILORA": unilora,
}
"""The adapter types of this family."""
