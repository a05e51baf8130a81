"""Rows of tables in host memory: nobody waits for their copies, and many of them are the whole table."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import zinfer
from tests import architectures
from tests.streaming.devices import run_within
from tests.streaming.test_attached import MEMORY
from tests.streaming.test_exactness import IDS
from zinfer.device import rows as module
from zinfer.device.processor import ALIGNMENT
from zinfer.device.rows import PIECE_BYTES, STAGE_BYTES, Rows
from zinfer.device.staged import StagedProcessor
from zinfer.weights.lowering import Placed, Run


class Gated(StagedProcessor):
    """Copies run once `open` is set, and are followed by nobody: as on a GPU, where operators wait for them."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.followed: list[Any] = []
        super().__init__(MEMORY, delay=self._late)

    def _late(self, kind: str) -> float:
        assert self.open.wait(60)
        return 0.0

    def follow(self, event: Any) -> None:
        """See Processor."""
        self.followed.append(event)


@pytest.fixture
def gated():
    processor = Gated()
    yield processor
    processor.open.set()
    processor.close()


def table_of(rows: int, width: int) -> tuple[torch.Tensor, Placed]:
    table = torch.arange(rows * width, dtype=torch.int32).view(rows, width)
    run = Run("nowhere", 0, table.nbytes)
    return table, Placed((run,), tuple(table.shape), table.dtype)


@pytest.mark.parametrize("width", [3, 1000, PIECE_BYTES // 4 + 5])
def test_the_host_does_not_wait_for_rows_that_are_copied(width, gated):
    table, like = table_of(7, width)
    stage = Rows(gated, "off")
    found = stage.gathered(table.numpy(), 0, like, [1, 2, 5][: 1 if width > 1000 else 3], 0)
    (event,) = gated.followed
    assert not event.done, "it was waited for"
    assert not torch.equal(found, table[[1, 2, 5][: found.shape[0]]]), (
        "nothing was late: the test proves nothing"
    )
    gated.open.set()
    event.wait()
    assert torch.equal(found, table[[1, 2, 5][: found.shape[0]]])
    stage.close()


def test_rows_that_were_read_are_copied_the_same_way(gated):
    table, _ = table_of(7, 300_000)
    stage = Rows(gated, "off")
    gated.open.set()
    found = stage.copied(table, 0)
    gated.followed[-1].wait()
    assert torch.equal(found, table)
    stage.close()


def test_more_rows_than_the_stage_holds_pass_through_it(gated):
    table, like = table_of(600, 10_000)
    rows = list(range(600))
    assert table.nbytes > 2 * STAGE_BYTES
    gated.open.set()
    stage = Rows(gated, "off")
    found = stage.gathered(table.numpy(), 0, like, rows, 0)
    gated.followed[-1].wait()
    assert torch.equal(found, table)
    assert stage._pool is not None and stage._pool.capacity == STAGE_BYTES
    stage.close()
    assert stage._pool.base_address == 0, "somebody holds what was copied"


def test_a_row_stands_where_it_is_asked_to(gated):
    table, like = table_of(7, 3)
    gated.open.set()
    stage = Rows(gated, "off")
    for residue in (0, 4, 252):
        found = stage.gathered(table.numpy(), 0, like, [3], residue)
        gated.followed[-1].wait()
        assert found.data_ptr() % ALIGNMENT == residue
        assert torch.equal(found, table[3:4])
    stage.close()


def test_the_stage_is_page_locked_where_copies_from_such_memory_run_by_themselves(gated, monkeypatch):
    asked = []

    def pool(nbytes: int, *, page_lock: Any) -> Any:
        asked.append((nbytes, page_lock))
        return real(nbytes, page_lock="off")

    real = module.Pool
    monkeypatch.setattr(module, "Pool", pool)
    gated.open.set()
    table, like = table_of(7, 3)
    stage = Rows(gated, "auto")
    for _ in range(2):
        stage.gathered(table.numpy(), 0, like, [3], 0)
    assert asked == [(STAGE_BYTES, "auto")]
    stage.close()


class Counting(StagedProcessor):
    """Counts the bytes that are copied for somebody who asked, not those ahead."""

    copied = 0

    def copy(self, moves: Any, after: Any, *, urgent: bool) -> Any:
        """See Processor."""
        self.copied += sum(source.nbytes for _, source in moves) if urgent else 0
        return super().copy(moves, after, urgent=urgent)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_many_rows_of_a_table_in_host_memory_are_all_of_it(dtype, saved, nothing_left):
    """And none of it is read from the drive, nor of one that is cast."""
    folder = saved("llama")
    reference = architectures.ALL["llama"][0].from_pretrained(folder, dtype=dtype).eval()
    total = architectures.parameter_bytes(reference)
    processor = Counting(MEMORY)
    with (
        run_within(folder, processor, total // 2, 4 * total, offload="cpu", dtype=dtype) as model,
        torch.no_grad(),
    ):
        table = model.get_input_embeddings().weight
        assert isinstance(table, zinfer.weights.parameter.StreamedParameter)
        embed, expected = model.get_input_embeddings(), reference.get_input_embeddings()
        few, many = IDS[:1], torch.arange(80)[None]
        read = model.zinfer.bytes_read
        coordinator = model.zinfer._streaming.coordinator
        coordinator.device.on_room = None  # nothing is read ahead from here on: the window has room
        coordinator.drop_ahead()
        deadline = time.monotonic() + 10
        while coordinator.device.in_use:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for ids, rows in ((few, len(set(few.flatten().tolist()))), (many, table.shape[0])):
            before = processor.copied
            assert torch.equal(embed(ids), expected(ids))
            width = table.shape[1] * (4 if dtype == "bfloat16" else table.dtype.itemsize)
            if dtype == "bfloat16":
                rows = len(set(ids.flatten().tolist()))  # what is cast is cast row by row
            assert processor.copied - before == rows * width
        assert torch.equal(table[9], expected.weight[9])
        assert model.zinfer.bytes_read == read
