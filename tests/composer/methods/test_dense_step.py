"""One dense matrix at a time, and the same bits for any number of threads."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from time import sleep
from typing import Any

import pytest
import torch

from composer.deltas.delta import Layout, LowRank, RowwiseDelta
from composer.deltas.variants.load import LoadedAdapter
from composer.methods import pipeline
from composer.methods.combine import combine_deltas
from composer.methods.matrix import Matrix
from composer.methods.spectral import compress_dense

SIDE = 96


class Inside:
    """Counts the threads inside at once: their maximum, and the number of entries."""

    def __init__(self) -> None:
        self._lock, self._now, self.most, self.times = Lock(), 0, 0, 0

    def watched(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: object) -> object:
            with self._lock:
                self._now, self.times = self._now + 1, self.times + 1
                self.most = max(self.most, self._now)
            try:
                sleep(0.02)  # so that another one could enter
                return work(*given)
            finally:
                with self._lock:
                    self._now -= 1

        return step


def factored(number: int) -> LowRank:
    generator = torch.Generator().manual_seed(number)
    A, B = torch.randn(4, SIDE, generator=generator), torch.randn(SIDE, 4, generator=generator)
    return LowRank(module=f"m{number}", weight=f"m{number}.weight", layout=Layout.LINEAR, A=A, B=B, scale=1.0)


@pytest.mark.parametrize("method", ["ties_svd", "dare_linear_svd", "sce_svd"])
def test_two_places_are_never_dense_at_once(red: LoadedAdapter, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside()
    monkeypatch.setattr(pipeline, "compress_dense", inside.watched(compress_dense))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    own = replace(red, deltas=tuple(map(factored, range(8))))
    combined = combine_deltas([own, own], [1.0, 0.5], method, {"rank": 4})
    assert [compression.rank for compression in combined.compressions] == [4] * 8
    assert (inside.most, inside.times) == (1, 8)


def test_deltas_that_are_only_made_whole_are_made_one_place_at_a_time(
    red: LoadedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = Inside()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def rowwise(number: int) -> RowwiseDelta:
        rows = inside.watched(lambda W, begin: torch.eye(SIDE)[begin : begin + len(W)])
        return RowwiseDelta(
            module=f"m{number}", weight=f"m{number}.weight", stored_shape=(SIDE, SIDE), rows=rows, all_rows=True
        )

    own = replace(red, deltas=tuple(map(rowwise, range(6))))
    assert len(combine_deltas([own], [1.0], "ties_svd", {"rank": 2}).compressions) == 6
    assert (inside.most, inside.times) == (1, 6)


def test_a_dense_matrix_is_cut_to_the_same_bits_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(700, 30, generator=generator) @ torch.randn(30, 650, generator=generator)
    results: dict[int, Mapping[str, torch.Tensor]] = {}
    for threads in (1, 2, 5):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        (left, right), lost = compress_dense("m", Matrix.of(X), 20, None)
        results[threads] = {"left": left, "right": right, "lost": torch.tensor([lost.norm, lost.error])}
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(Matrix.of(X).dense(pool), X)
    assert all(torch.equal(result[name], results[1][name]) for result in results.values() for name in result)
