"""LoRA and other low-rank sums: block-diagonal factors, experts, biases; and trained token rows.

Shapes: O outputs, I inputs, R rank, E experts; W_MN as stored.
"""

import torch

from composer.deltas.delta import Delta, ExpertSlice, Layout, LowRank, RowwiseDelta
from composer.deltas.stored import Factor, tensor_of
from composer.deltas.variants.source import ModuleParts
from composer.formats.adapters.placement.naming import TOKENS, split_key
from composer.formats.adapters.placement.result import Piece


def pair(module: ModuleParts) -> list[Delta]:
    """s B A (arXiv 2106.09685). In a convolution, A has the kernel after its inputs, and B is 1 x 1."""
    return [module.low_rank(*_stored(module), module.placed.scale)]


def factors(module: ModuleParts) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B), R x I and O x R."""
    A, B = _stored(module)
    return tensor_of(A), tensor_of(B)


def _stored(module: ModuleParts) -> tuple[Factor, Factor]:
    prefix = "lora_embedding_" if module.layout is Layout.EMBEDDING else "lora_"
    return module.factor(f"{prefix}A"), module.factor(f"{prefix}B")


def block_diagonal(module: ModuleParts) -> list[Delta]:
    """BD-LoRA, which stores only the blocks of A or B, stacked vertically."""
    A_RI, B_OR = factors(module)
    blocks = module.config.blocks
    side = "" if blocks is None else blocks.side(module.placed.module)
    count = 1 if blocks is None else blocks.count
    if side == "A":
        A_RI = torch.block_diag(*A_RI.chunk(count))
    if side == "B":
        B_OR = torch.block_diag(*B_OR.chunk(count))
    return [module.low_rank(A_RI, B_OR, module.placed.scale)]


def experts(module: ModuleParts) -> list[Delta]:
    """s B[:, :, e] A[e] for each expert, which is the slow index of A's rows and the fast index of B's columns."""
    placed, rank = module.placed, module.placed.rank
    A, B = module.factor("lora_A"), module.factor("lora_B")
    count, outputs = A.shape[0] // rank, B.shape[0]
    owner, _, parameter = placed.module.rpartition(".")
    rows = outputs if module.layout is Layout.LINEAR else A.shape[1]

    def one(piece: Piece) -> LowRank:
        own = piece.weight.split(".")[-2] if piece.weight.endswith(".weight") else parameter
        first_row = piece.expert * rank
        name, begin = f"{owner}.{piece.expert}.{own}", piece.expert * rows + piece.first
        stacked = ExpertSlice(
            parameter=placed.module,
            expert=piece.expert,
            experts=count,
            first=piece.first,
            outputs=outputs,
            begin=begin,
        )
        return LowRank(
            module=name,
            weight=piece.weight,
            layout=module.layout,
            A=A[first_row : first_row + rank],
            B=B[piece.first : piece.last, piece.expert :: count],
            scale=placed.scale,
            begin=piece.begin,
            stacked=stacked,
        )

    return [one(piece) for piece in placed.pieces]


def bias(module: ModuleParts) -> list[Delta]:
    """lora_B's own bias, times s."""
    b_M = module["lora_B_bias"]
    scale = module.placed.scale

    def rows(W_M1: torch.Tensor, begin: int) -> torch.Tensor:
        return scale * b_M[begin : begin + len(W_M1), None].to(W_M1)

    return [module.computed(rows, reads_base=False)]


def tokens(module: ModuleParts) -> list[Delta]:
    """Replaces W[ids] by the trained rows, despite the part's name. `ids` are in the config's order."""
    placed, new_TN = module.placed, module[TOKENS]
    # The embedding's name is in the key, since a tied head's rows are the embedding's.
    ids_T = torch.tensor(module.config.tokens_of(split_key(module.placed.parts[TOKENS]).module), dtype=torch.long)

    def rows(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
        inside = (ids_T >= begin) & (ids_T < begin + len(W_MN))
        at = ids_T[inside] - begin
        delta_MN = torch.zeros_like(W_MN)
        delta_MN[at] = new_TN[inside].to(W_MN) - W_MN[at]
        return delta_MN

    changed = RowwiseDelta(
        module=placed.module, weight=placed.weight, stored_shape=module.stored_shape, rows=rows, reads_base=True,
        tied=placed.tied, layout=Layout.EMBEDDING, twin=placed.twin, sets_rows=frozenset(ids_T.tolist()),
    )  # fmt: skip
    return [changed]
