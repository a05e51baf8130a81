"""The yardstick: plain reads of a drive."""

import numpy as np
import pytest

from zinfer.aio import probe
from zinfer.aio.probe import BLOCK_BYTES, measure_read_rate
from zinfer.errors import DriveError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * BLOCK_BYTES))
    return str(path)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (1, 2 * BLOCK_BYTES),
        (2 * BLOCK_BYTES, 2 * BLOCK_BYTES),
        (2 * BLOCK_BYTES + 1, 4 * BLOCK_BYTES),
        (12 * BLOCK_BYTES, 12 * BLOCK_BYTES),
    ],
)
def test_the_probe_takes_the_memory_asked_for_in_blocks_for_each_reader(file, monkeypatch, asked, taken):
    sizes = []

    class Watched(probe.Pool):
        def __init__(self, capacity, **options):
            sizes.append(capacity)
            super().__init__(capacity, **options)

    monkeypatch.setattr(probe, "Pool", Watched)
    assert measure_read_rate([file], 0.05, asked).nbytes > 0
    assert sizes == [taken]


def test_every_block_of_the_memory_is_read_into(file, monkeypatch):
    into = set()
    real = probe.os.preadv

    def preadv(descriptor, views, offset):
        into.add(np.frombuffer(views[0], np.uint8).ctypes.data)
        return real(descriptor, views, offset)

    monkeypatch.setattr(probe.os, "preadv", preadv)
    rate = measure_read_rate([file], 0.5, 8 * BLOCK_BYTES)
    assert rate.nbytes >= 8 * BLOCK_BYTES
    assert len(into) == 8


def test_the_rate_is_bytes_over_seconds(file):
    rate = measure_read_rate([file], 0.05)
    assert rate.bytes_per_second == pytest.approx(rate.nbytes / rate.seconds)


def test_a_file_below_a_block_cannot_be_measured(tmp_path):
    (tmp_path / "small").write_bytes(bytes(BLOCK_BYTES - 1))
    with pytest.raises(DriveError, match="no file of"):
        measure_read_rate([str(tmp_path / "small")])
