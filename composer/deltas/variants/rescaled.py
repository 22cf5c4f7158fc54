"""Deltas that scale or replace parts of the base: DoRA, KaSA, (IA)3, HiRA, DEFT, GLoRA; and BEFT.

W_OI are rows of the weight as the module uses it.
"""

import torch

from composer.deltas.delta import Delta
from composer.deltas.variants.lora import factors
from composer.deltas.variants.source import ModuleParts, Read


def dora(module: ModuleParts) -> list[Delta]:
    """m / |V| * V - W with V = W + s B A, norms over the inputs of each output (arXiv 2402.09353, eq. 5)."""
    A_RI, B_OR = factors(module)
    m_O, scale = module["magnitude"].flatten(), module.placed.scale

    def added(W_OI: torch.Tensor, begin: int) -> tuple[torch.Tensor, slice]:
        own = slice(begin, begin + len(W_OI))
        return torch.addmm(W_OI, B_OR[own].to(W_OI), A_RI.to(W_OI), alpha=scale), own

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        V_OI, own = added(W_OI, begin)
        factor_O = m_O[own].to(W_OI) / torch.linalg.vector_norm(V_OI, dim=1)
        return V_OI.mul_(factor_O[:, None]).sub_(W_OI)

    def rows_on(W_OI: torch.Tensor, now_OI: torch.Tensor, begin: int) -> torch.Tensor:
        V_OI, own = added(W_OI, begin)
        factor_O = m_O[own].to(W_OI) / torch.linalg.vector_norm(V_OI, dim=1)
        return added(now_OI, begin)[0].mul_(factor_O[:, None]).sub_(now_OI)

    return [module.computed(rows, rows_on=rows_on)]


def kasa(module: ModuleParts) -> list[Delta]:
    """s B diag(v) A on a base without its R smallest singular triples (arXiv 2412.06071)."""
    A_RI, B_OR = factors(module)
    v_R, scale, rank = module["lora_diag"], module.placed.scale, module.placed.rank

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        U_OK, S_K, V_KI = torch.linalg.svd(W_OI, full_matrices=False)
        dropped_OI = (U_OK[:, -rank:] * S_K[-rank:]) @ V_KI[-rank:]
        return scale * (B_OR.to(W_OI) * v_R.to(W_OI)) @ A_RI.to(W_OI) - dropped_OI

    return [module.computed(rows, alone=True, all_rows=True)]


def ia3(module: ModuleParts) -> list[Delta]:
    """W * l - W, l for outputs (O x 1) or inputs (1 x I) (arXiv 2205.05638). A bias is scaled as an output."""
    l_OI = module["ia3_l"]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        own_OI = l_OI if len(l_OI) == 1 else l_OI[begin : begin + len(W_OI)]
        return W_OI * (own_OI.to(W_OI) - 1)

    return [module.computed(rows)]


def hira(module: ModuleParts) -> list[Delta]:
    """W * (B A), element by element (Huang et al., ICLR 2025)."""
    prefix = "hira_embedding_" if "hira_embedding_A" in module else "hira_"
    A_RI, B_OR = module[f"{prefix}A"], module[f"{prefix}B"]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        return W_OI * (B_OR[begin : begin + len(W_OI)].to(W_OI) @ A_RI.to(W_OI))

    return [module.computed(rows)]


def deft(module: ModuleParts) -> list[Delta]:
    """Q (R - right^T W): W loses what it puts out in P's subspace, and gets R there (PEFT's DeftLinear). `relu`: Q = P,
    right = relu(P); `qr`: both are P's orthonormal basis, in float32 as PEFT has it. PaRa has no R."""
    P_OR, options = module.value("deft_P"), module.options
    Q_OR = torch.linalg.qr(P_OR)[0] if options["decomposition_method"] == "qr" else P_OR
    right_OR = Q_OR if options["decomposition_method"] == "qr" else P_OR.relu()
    alpha, rank = float(options["alpha"]), P_OR.shape[1]
    R_RI = None if options["para"] else module.value("deft_R") * (alpha / rank if alpha else 1.0)

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        kept_RI = right_OR.to(W_OI).T @ W_OI
        return Q_OR.to(W_OI) @ ((0.0 if R_RI is None else R_RI.to(W_OI)) - kept_RI)

    return [module.computed(rows, all_rows=True)]


def beft(module: ModuleParts) -> list[Delta]:
    """b, added to the module's bias."""
    b_M = module["beft_bias"].flatten()

    def rows(W_M1: torch.Tensor, begin: int) -> torch.Tensor:
        return b_M[begin : begin + len(W_M1), None].to(W_M1)

    return [module.computed(rows, reads_base=False)]


def glora(module: ModuleParts) -> list[Delta]:
    """W * A + B; a bias gets b * D + E (arXiv 2306.07967, as PEFT implements it). W C, which a bias would get too,
    is refused when the adapter is placed. Each adapter acts on the base's own W, so that several have no order."""
    paths = "DE" if module.placed.kind == "bias" else "AB"

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        scale, shift = (_glora_rows(module, f"glora_{path}", W_OI, begin) for path in paths)
        return W_OI * scale + shift

    return [module.computed(rows, rescales=False)]


def _glora_rows(module: ModuleParts, path: str, W_OI: torch.Tensor, begin: int) -> torch.Tensor:
    """The path's rows for those of W: 1 x 1 for a constant."""
    own = slice(begin, begin + len(W_OI))
    if f"{path}.Xd" in module:
        return module[f"{path}.Xd"][own].to(W_OI) @ module[f"{path}.Xu"].to(W_OI)
    value = module[f"{path}.X" if f"{path}.X" in module else f"{path}.zeros"].to(W_OI)
    value_OI = value if value.ndim == 2 else value[:, None]
    return value_OI if len(value_OI) == 1 else value_OI[own]


READERS: dict[str, Read] = {
    "BEFT": beft,
    "DEFT": deft,
    "IA3": ia3,
    "GLORA": glora,
    "HIRA": hira,
}
"""The adapter types of this family."""
