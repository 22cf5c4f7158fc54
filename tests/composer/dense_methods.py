"""A reference implementation of the methods, on dense float64 matrices and without any of the composer's code."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

Dense = torch.Tensor


def trimmed(X: Dense, density: float) -> Dense:
    kept = X.abs().flatten().argsort(descending=True, stable=True)[: int(density * X.numel())]
    mask = torch.zeros(X.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.reshape(X.shape), X, 0.0)


def without_outliers(X: Dense, density: float, gamma: float) -> Dense:
    order = X.abs().flatten().argsort(descending=True, stable=True)
    outliers = int(gamma * X.numel())
    mask = torch.zeros(X.numel(), dtype=torch.bool)
    mask[order[outliers : outliers + int(density * X.numel())]] = True
    return torch.where(mask.reshape(X.shape), X, 0.0)


def draws(shape: torch.Size, seed: int, key: str) -> torch.Tensor:
    """Uniform in [0, 2^16): Philox 4x64 of a key each, 64 rows a count, a row in whole 64-bit words."""
    words = np.frombuffer(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16], dtype="<u8")
    quads = -(-shape[1] // 4)
    parts = [
        np.random.Philox(key=words, counter=np.array([0, 0, 0, block], dtype=np.uint64)).random_raw(64 * quads)
        for block in range(-(-shape[0] // 64))
    ]
    numbers = np.concatenate(parts).astype("<u8").view("<u2").reshape(-1, 4 * quads)
    return torch.from_numpy(numbers[: shape[0], : shape[1]].astype(np.float64))


def dare(X: Dense, density: float, seed: int, key: str) -> Dense:
    return torch.where(draws(X.shape, seed, key) < density * 2**16, X / density, 0.0)


def della(X: Dense, density: float, epsilon: float, seed: int, key: str) -> Dense:
    rank = X.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
    q = density - epsilon + 2 * epsilon * rank / (X.shape[1] - 1)
    return torch.where(draws(X.shape, seed, key) < q * 2**16, X / q, 0.0)


def in_ctm(Xs: Sequence[Dense], rank: int) -> tuple[Dense, Dense, list[Dense]]:
    """(U, V, X_i) where the bases hold all there is: then neither depends on the other, and nothing alternates."""
    same = [X / X.norm() for X in Xs]
    U = torch.linalg.svd(torch.cat(same, 1), full_matrices=False)[0][:, :rank]
    V = torch.linalg.svd(torch.cat([X.T for X in same], 1), full_matrices=False)[0][:, :rank]
    return U, V, [U.T @ X @ V for X in Xs]


def elected(Xs: Sequence[Dense], weights: Sequence[float], vote: str = "plain", divide: str = "count") -> Dense:
    votes = torch.zeros_like(Xs[0])
    for X, w in zip(Xs, weights, strict=True):
        votes += {"plain": X, "weighted": w * X, "count": X.sign()}[vote]
    votes = torch.where(votes == 0, sum(Xs, torch.zeros_like(votes)), votes)
    sign = torch.where(votes >= 0, 1.0, -1.0)
    total, count, weight = (torch.zeros_like(Xs[0]) for _ in range(3))
    for X, w in zip(Xs, weights, strict=True):
        agrees = (w * X if vote == "weighted" else X).sign() == sign
        total += w * X * agrees
        count += agrees
        weight += w * agrees
    if divide == "none":
        return total
    D = weight if divide == "weights" else count
    return total / torch.where(D == 0, torch.ones_like(D), D)


def summed(Xs: Sequence[Dense], weights: Sequence[float]) -> Dense:
    return torch.stack([w * X for X, w in zip(Xs, weights, strict=True)]).sum(0)


def sce(Xs: Sequence[Dense], weights: Sequence[float], density: float) -> Dense:
    Xs = [w * X for X, w in zip(Xs, weights, strict=True)]
    variance = torch.stack(list(Xs)).var(dim=0, unbiased=False)
    kept = variance.flatten().argsort(descending=True, stable=True)[: int(density * int(variance.count_nonzero()))]
    mask = torch.zeros(variance.numel(), dtype=torch.bool)
    mask[kept] = True
    Xs = [torch.where(mask.reshape(X.shape), X, 0.0) for X in Xs]
    energies = [float(X.square().mean()) for X in Xs]
    own = [energy / sum(energies) for energy in energies]
    sign = torch.where(torch.stack(Xs).sum(0) >= 0, 1.0, -1.0)
    total, D = torch.zeros_like(Xs[0]), torch.zeros_like(Xs[0])
    for X, w in zip(Xs, own, strict=True):
        agrees = X.sign() == sign
        total += w * X * agrees
        D += w * agrees
    return total / D.clamp(min=1e-6)


def truncated(X: Dense, rank: int) -> Dense:
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def tsv(Xs: Sequence[Dense], weights: Sequence[float], ranks: Sequence[int]) -> Dense:
    most = max(1, min(Xs[0].shape) // len(Xs))
    U, s, V = [], [], []
    for X, w, rank in zip(Xs, weights, ranks, strict=True):
        U_i, s_i, Vh_i = torch.linalg.svd(X, full_matrices=False)
        t = min(rank, most)
        U.append(U_i[:, :t])
        s.append(w * s_i[:t])
        V.append(Vh_i[:t].T)

    def polar(M: Dense) -> Dense:
        left, _, right = torch.linalg.svd(M, full_matrices=False)
        return left @ right

    return polar(torch.cat(U, 1)) @ torch.diag(torch.cat(s)) @ polar(torch.cat(V, 1)).T


def iso(X: Dense) -> Dense:
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    n = int((s > 1e-8 * s[0]).sum())
    return s[:n].mean() * U[:, :n] @ Vh[:n]


def in_core(pairs: Sequence[tuple[Dense, Dense]], canonical: bool) -> tuple[Dense, Dense, list[Dense]]:
    """(P, Q, X_i): the left singular vectors of the stacked B, the right ones of the stacked A."""
    if canonical:
        pairs = [balanced(B @ A, A.shape[0]) for B, A in pairs]
    P = torch.linalg.svd(torch.cat([B for B, _ in pairs], 1), full_matrices=False)[0]
    Q = torch.linalg.svd(torch.cat([A for _, A in pairs]), full_matrices=False)[2].T
    return P, Q, [P.T @ B @ A @ Q for B, A in pairs]


def balanced(X: Dense, rank: int) -> tuple[Dense, Dense]:
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    root = s[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def in_knots(Xs: Sequence[Dense], rank: int) -> tuple[Dense, list[Dense]]:
    U, s, Vh = torch.linalg.svd(torch.cat(list(Xs), 1), full_matrices=False)
    columns = Xs[0].shape[1]
    return U[:, :rank], [s[:rank, None] * Vh[:rank, i * columns : (i + 1) * columns] for i in range(len(Xs))]


def pico(pairs: Sequence[tuple[Dense, Dense]], *, canonical: bool) -> list[tuple[Dense, Dense]]:
    """The calibrated pairs."""
    if canonical:
        split = [(torch.linalg.svd(B @ A, full_matrices=False), B.shape[1]) for B, A in pairs]
        pairs = [(U[:, :rank] * s[:rank], Vh[:rank]) for (U, s, Vh), rank in split]
    stacked = torch.cat([B for B, _ in pairs], 1)
    U, s, _ = torch.linalg.svd(stacked, full_matrices=False)
    c = s**2 / (s**2).sum()
    damp = U @ torch.diag(1 / (1 + (len(pairs) - 1) * c)) @ U.T
    return [(damp @ B, A) for B, A in pairs]
