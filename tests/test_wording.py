"""What messages and reports repeat stays short, and sizes have a unit that fits."""

from __future__ import annotations

import pytest

from zinfer.wording import LONGEST_ECHO, brief, size_text


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"x" * 10**6, [7] * 10**5, {"a": "x" * 10**5}, 1 << 20_000],
    ids=lambda value: type(value).__name__,
)
def test_a_long_value_is_cut(value):
    assert len(brief(value)) <= LONGEST_ECHO + len("...")


@pytest.mark.parametrize("value", ["cpu", 5, None, -1.5, ["a"], True])
def test_a_short_value_is_repeated_as_it_is(value):
    assert brief(value) == repr(value)


def test_a_value_that_cannot_be_shown_is_named_by_its_type():
    class Odd:
        def __repr__(self) -> str:
            raise ValueError("no")

    assert "Odd" in brief(Odd())


def test_a_size_is_in_gib_from_a_tenth_on():
    assert size_text(5 << 30) == "5.00 GiB"
    assert size_text(3 << 20) == "3.00 MiB"
