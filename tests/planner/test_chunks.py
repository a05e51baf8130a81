"""A prompt is cut into as few equal parts as fit the memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zinfer.planner.chunks import SMALLEST_CHUNK, chunks_of, prefill_chunk


def test_a_prompt_that_fits_is_not_cut():
    assert prefill_chunk(1000, 1000, lambda tokens: tokens) == 1000


def test_a_prompt_that_does_not_fit_is_cut_into_equal_parts():
    assert prefill_chunk(1000, 999, lambda tokens: tokens) == 500
    assert prefill_chunk(1000, 400, lambda tokens: tokens) == 334


def test_no_chunk_is_smaller_than_makes_sense():
    assert prefill_chunk(1000, 1, lambda tokens: tokens) == SMALLEST_CHUNK
    assert prefill_chunk(SMALLEST_CHUNK, 1, lambda tokens: tokens) == SMALLEST_CHUNK
    assert prefill_chunk(3, 1, lambda tokens: tokens) == 3


@given(
    prompt=st.integers(1, 10_000),
    room=st.integers(0, 100_000),
    each=st.integers(1, 20),
    fixed=st.integers(0, 5000),
)
def test_chunks_fit_and_are_as_few_as_can_be(prompt, room, each, fixed):
    def bytes_at(tokens):
        return fixed * (tokens < prompt) + each * tokens

    chunk = prefill_chunk(prompt, room, bytes_at)
    assert 1 <= chunk <= prompt
    if bytes_at(min(SMALLEST_CHUNK, prompt)) <= room:
        assert bytes_at(chunk) <= room
    passes = chunks_of(prompt, chunk)
    assert (passes - 1) * chunk < prompt <= passes * chunk
    if passes > 1:  # the smallest chunk of which one pass less would do
        larger = -(-prompt // (passes - 1))
        assert bytes_at(larger) > room or larger <= SMALLEST_CHUNK
