"""How much of a prompt is prefilled at once: pure functions on plain data.

Each chunk is a sweep of its own, which reads every weight that streams once more; so there are as few as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable

SMALLEST_CHUNK = (
    16  # tokens of each sequence; prefilling fewer at once would read a model for next to nothing
)


def prefill_chunk(prompt: int, room: int, bytes_at: Callable[[int], int]) -> int:
    """Tokens to prefill at once: all of `prompt`, or as few equal parts of it as fit `room` bytes.

    `bytes_at`: what a pass over so many tokens takes besides weights and caches; it must not fall when they grow more.
    Where not even SMALLEST_CHUNK tokens fit, it is that many.
    """
    if prompt <= SMALLEST_CHUNK or bytes_at(prompt) <= room:
        return prompt
    fits, too_many = SMALLEST_CHUNK, prompt
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if bytes_at(middle) <= room else (fits, middle)
    return -(-prompt // chunks_of(prompt, fits))


def chunks_of(prompt: int, chunk: int) -> int:
    """How many passes a prompt takes in chunks of `chunk` tokens."""
    return -(-prompt // chunk)
