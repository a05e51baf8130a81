"""The pure split: every wanted byte once, every read aligned, nothing outside what was promised."""

from hypothesis import given
from hypothesis import strategies as st

from .conftest import _split

BLOCK, SLOT = 16384, 8192


def pieces(offset, length, address, slack, alignment=4096, block=BLOCK, slot=SLOT):
    return _split([(0, offset, length, address, slack)], alignment, block, slot)


@given(
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 17),
    st.integers(1 << 20, 1 << 21),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 512, 4096]),
)
def test_pieces_cover_each_byte_once_with_aligned_reads(offset, length, address, slack, congruent, alignment):
    if congruent:
        address += (offset - address) % alignment
    at = offset
    for _, start, size, destination, read_start, read_size, bounced in pieces(
        offset, length, address, slack, alignment
    ):
        assert start == at and size > 0
        assert destination == address + (start - offset)
        assert read_start % alignment == 0 and read_size % alignment == 0
        assert read_start <= start and start + size <= read_start + read_size
        assert read_start > start - alignment and read_start + read_size < start + size + alignment
        assert read_size <= (SLOT if bounced else BLOCK)
        if not bounced:
            assert (destination - (start - read_start)) % alignment == 0
            if not slack:
                assert (start, size) == (read_start, read_size)
        at += size
    assert at == offset + length


def test_neighbours_in_file_and_memory_become_one_piece():
    rows = _split([(0, 0, 100, 5000, False), (0, 50, 0, 1, False), (0, 100, 60, 5100, False)], 1, BLOCK, SLOT)
    assert rows == [(0, 0, 160, 5000, 0, 160, False)]


def test_neighbours_in_the_file_alone_stay_apart():
    assert len(_split([(0, 0, 100, 5000, False), (0, 100, 60, 9000, False)], 1, BLOCK, SLOT)) == 2


def test_extents_of_two_files_stay_apart():
    assert len(_split([(0, 0, 100, 5000, False), (1, 100, 60, 5100, False)], 1, BLOCK, SLOT)) == 2


def test_slack_goes_straight_to_memory_in_whole_blocks():
    rows = pieces(100, 2 * BLOCK, 4096 + 100, True)
    assert [row[4:] for row in rows] == [(0, BLOCK, False), (BLOCK, BLOCK, False), (2 * BLOCK, 4096, False)]


def test_without_slack_only_the_ragged_ends_are_bounced():
    rows = pieces(100, 100_000, 4096 + 100, False)
    assert [row[6] for row in rows] == [True] + [False] * (len(rows) - 2) + [True]


def test_a_small_ragged_range_is_one_bounced_read():
    assert [row[4:] for row in pieces(100, 5000, 4096 + 100, False)] == [(0, 8192, True)]
