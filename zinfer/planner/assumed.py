"""The work of a model that cannot be run without data: what a dense transformer of its size would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zinfer.planner.cost import Operator, PassWork, Work

ACTIVATIONS = 16  # hidden states of a layer that are alive at once: a gated feed-forward's inner ones, mostly


@dataclass(frozen=True)
class Matrix:
    """A weight: its index, elements, bytes and dtype."""

    index: int
    numel: int
    nbytes: int
    dtype: str


def assumed_work(
    matrices: Sequence[Matrix],
    batch: int,
    prompt: int,
    new_tokens: int,
    *,
    cache_at: Callable[[int], int],
    hidden: int,
) -> Work:
    """2 flops for each element of each matrix and row.

    The estimate of Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1. `cache_at`: bytes of
    the whole batch's cache at a length in tokens; `hidden`: bytes of a token's hidden state.
    """
    cache = cache_at(prompt + max(new_tokens - 1, 0))
    mean = cache_at(prompt + new_tokens // 2)

    def one_pass(rows: int, cached: int) -> PassWork:
        products = [
            Operator("matmul", matrix.dtype, rows, 2.0 * matrix.numel * rows, matrix.nbytes)
            for matrix in matrices
        ]
        attention = Operator("attention", "float32", 1, 0, cached)
        return PassWork((*products, attention), tuple((matrix.index, 1.0) for matrix in matrices))

    return Work(
        batch,
        one_pass(batch * prompt, 0),
        one_pass(batch, mean),
        cache,
        ACTIVATIONS * hidden * batch * prompt,
    )
