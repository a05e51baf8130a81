"""The work of a model that cannot be run without data: what a dense transformer of its size would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zinfer.planner.cost import Operator, Pass, Work

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
    layers: int,
    key_width: int,
    hidden: int,
) -> Work:
    """2 flops for each element of each matrix and row, and a cache of keys and values in every layer.

    The estimate of Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1. `key_width`: bytes of
    one token's keys and values in one layer; `hidden`: bytes of its hidden state.
    """
    cache = batch * layers * key_width * (prompt + max(new_tokens - 1, 0))
    mean = batch * layers * key_width * (prompt + new_tokens // 2)

    def one_pass(rows: int, cached: int) -> Pass:
        products = [
            Operator("matmul", matrix.dtype, rows, 2.0 * matrix.numel * rows, matrix.nbytes)
            for matrix in matrices
        ]
        attention = Operator("attention", "float32", 1, 0, cached)
        return Pass((*products, attention), tuple((matrix.index, 1.0) for matrix in matrices))

    return Work(
        batch,
        one_pass(batch * prompt, 0),
        one_pass(batch, mean),
        cache,
        ACTIVATIONS * hidden * batch * prompt,
    )
