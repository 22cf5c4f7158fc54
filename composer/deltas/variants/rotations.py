"""Deltas that rotate the base's inputs or outputs: OFT, BOFT, HRA, RoAd. W_OI are rows of the weight.

K blocks of B x B on a diagonal.
"""

import torch

from composer.deltas.delta import Delta
from composer.deltas.variants.source import ModuleParts, Read
from composer.formats.adapters.config.parts import oft_block


def oft(module: ModuleParts) -> list[Delta]:
    """W R^T - W, R the Cayley transform of skew blocks (arXiv 2306.07280), by default its Neumann series as in PEFT."""
    entries_KE, options = module["oft_R"], module.options
    size = oft_block(entries_KE.shape[1])
    upper = torch.triu_indices(size, size, 1)

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        Q_KBB = W_OI.new_zeros(len(entries_KE), size, size)
        Q_KBB[:, upper[0], upper[1]] = entries_KE.to(W_OI)
        Q_KBB = Q_KBB - Q_KBB.mT
        if options["coft"]:
            # Constrained OFT: limits each block's norm to eps / sqrt(K).
            most = float(options["eps"]) / len(Q_KBB) ** 0.5
            norm_K11 = torch.linalg.matrix_norm(Q_KBB, keepdim=True)
            Q_KBB = torch.where(norm_K11 <= most, Q_KBB, Q_KBB * (most / norm_K11))
        neumann = options["use_cayley_neumann"]
        R_KBB = _neumann(Q_KBB, int(options["num_cayley_neumann_terms"])) if neumann else _cayley(Q_KBB)
        return _turned(W_OI, R_KBB) - W_OI

    return [module.computed(rows)]


def boft(module: ModuleParts) -> list[Delta]:
    """s * (W C^T) - W with one butterfly factor, whose blocks C are Cayley transforms (arXiv 2311.06243)."""
    R_KBB, s_O1 = module["boft_R"].squeeze(0), module["boft_s"]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        own_KBB = R_KBB.to(W_OI)
        turned_OI = _turned(W_OI, _cayley((own_KBB - own_KBB.mT) / 2))
        return turned_OI * s_O1[begin : begin + len(W_OI)].to(W_OI) - W_OI

    return [module.computed(rows)]


def hra(module: ModuleParts) -> list[Delta]:
    """W H - W, H a product of Householder reflections along u's columns (arXiv 2405.17484); with apply_GS, the
    columns are orthogonalized first."""
    u_IR, orthogonal = module["hra_u"], module.options["apply_GS"]

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        own_IR = u_IR.to(W_OI)
        # Gram-Schmidt; the signs are QR's, which do not matter for reflections.
        own_IR = torch.linalg.qr(own_IR).Q if orthogonal else own_IR / torch.linalg.vector_norm(own_IR, dim=0)
        turned_OI = W_OI
        for u_I in own_IR.T:
            turned_OI = turned_OI - 2 * torch.outer(turned_OI @ u_I, u_I)
        return turned_OI - W_OI

    return [module.computed(rows)]


def road(module: ModuleParts) -> list[Delta]:
    """R W - W: in each group of outputs the halves (y, z) become (c y - s z, s y + c z), c = a cos t and s = a sin t
    (arXiv 2409.00119, eq. 4). A bias is rotated as an output; road_2 and road_4 have a c and an s for each output."""
    theta, alpha, options = module["road_theta"], module["road_alpha"], module.options
    half = int(options["group_size"]) // 2
    variant = str(options["variant"])

    def columns(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles, scales = theta.to(like), alpha.to(like)
        if variant == "road_4":
            angles, scales = (tensor.view(-1, 2, 2, half).transpose(0, 1) for tensor in (angles, scales))
            return scales[0] * angles[0].cos(), scales[1] * angles[1].sin()
        angles, scales = (tensor.view(-1, 1 if variant == "road_1" else 2, half) for tensor in (angles, scales))
        return scales * angles.cos(), scales * angles.sin()

    def rows(W_OI: torch.Tensor, begin: int) -> torch.Tensor:
        cosine, sine = columns(W_OI)
        y_G2HI = W_OI.reshape(-1, 2, half, W_OI.shape[1])
        across_G2HI = torch.stack((-y_G2HI[:, 1], y_G2HI[:, 0]), dim=1)
        return (y_G2HI * cosine[..., None] + across_G2HI * sine[..., None]).reshape(W_OI.shape) - W_OI

    return [module.computed(rows, all_rows=True)]


def _turned(W_OI: torch.Tensor, R_KBB: torch.Tensor) -> torch.Tensor:
    """W blockdiag(R)^T; a single block is used for all."""
    parts_OKB = W_OI.unflatten(1, (-1, R_KBB.shape[-1]))
    return torch.einsum("okb,kcb->okc", parts_OKB, R_KBB.expand(parts_OKB.shape[1], -1, -1)).flatten(1)


def _cayley(Q_KBB: torch.Tensor) -> torch.Tensor:
    """(I - Q)(I + Q)^-1."""
    one = torch.eye(Q_KBB.shape[-1], dtype=Q_KBB.dtype, device=Q_KBB.device)
    return torch.linalg.solve(one + Q_KBB, one - Q_KBB, left=False)


def _neumann(Q_KBB: torch.Tensor, terms: int) -> torch.Tensor:
    """PEFT's I + 2 Q + … + 2 Q^(terms - 2) + Q^(terms - 1), at least up to Q^3 from three terms on."""
    R_KBB = torch.eye(Q_KBB.shape[-1], dtype=Q_KBB.dtype, device=Q_KBB.device).expand_as(Q_KBB).clone()
    if terms < 2:
        return R_KBB
    power_KBB = Q_KBB
    last = 1 if terms == 2 else max(terms - 2, 2)
    for _ in range(last):
        R_KBB += 2 * power_KBB
        power_KBB = power_KBB @ Q_KBB
    return R_KBB if terms == 2 else R_KBB + power_KBB


READERS: dict[str, Read] = {
    "OFT": oft,
    "BOFT": boft,
    "HRA": hra,
    "ROAD": road,
}
"""The adapter types of this family."""
