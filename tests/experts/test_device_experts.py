"""Experts on a device with memory of its own: bit-equal, whatever is late, and no more memory than was planned."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests import architectures
from tests.experts.test_streamed_experts import EIGHT
from tests.streaming.devices import run_within
from tests.streaming.test_attached import finish, staged
from tests.streaming.test_exactness import assert_same
from zinfer.experts.on_device import DeviceExperts


def there(model) -> DeviceExperts:
    experts = model.zinfer._streaming.experts
    assert isinstance(experts, DeviceExperts)
    return experts


# Of the checkpoint's bytes: on the device, on the host.
ROOM = {
    "one, one": (0.0, 0.0),
    "one, all": (0.0, 4.0),
    "some, some": (0.8, 0.8),
    "some, all": (0.8, 4.0),
    "all, one": (4.0, 0.0),
    "all, all": (4.0, 4.0),
}


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_mixtures_are_bit_equal_with_room_for_few_or_all_experts(name, room, saved, nothing_left):
    folder = saved(name)
    reference = architectures.reference(name, folder)
    total = architectures.parameter_bytes(reference)
    processor = staged(list(ROOM).index(room))
    device, host = (max(1, int(share * total)) for share in ROOM[room])
    model = run_within(folder, processor, device, host, offload="nvme")
    experts = there(model)
    if room.startswith("one"):
        experts.resize(0)
    assert_same(reference, model, name)
    with torch.no_grad():
        assert torch.equal(reference(EIGHT).logits, model(EIGHT).logits)
    figures = model.zinfer.report().experts
    assert figures is not None and figures.misses > 0
    assert experts.count * experts.slot_bytes <= experts.limit
    if room == "all, all":
        assert figures.device_hits > 0 and figures.misses <= figures.experts, "nothing is read twice"
        assert figures.device_cached == figures.misses
    if room == "one, all":
        assert figures.hits > figures.device_hits and figures.misses <= figures.experts
    if room == "one, one":
        assert figures.misses > figures.experts
    del experts
    finish(model, processor)


def test_threads_share_the_experts_on_the_device(saved, nothing_left):
    folder = saved("mixtral")
    reference = architectures.reference("mixtral", folder)
    total = architectures.parameter_bytes(reference)
    with torch.no_grad():
        expected = [reference(EIGHT[row : row + 1]).logits for row in range(8)]
    processor = staged(5)
    model = run_within(folder, processor, int(1.5 * total), total, offload="nvme")

    def use(row: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(EIGHT[row : row + 1]).logits, expected[row]) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(8)))
    finish(model, processor)


def test_experts_leave_the_device_for_caches_and_return(saved, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    total = architectures.parameter_bytes(reference)
    processor = staged(1)
    model = run_within(folder, processor, int(1.1 * total), 2 * total, offload="nvme")
    ids = EIGHT.repeat(4, 4)
    with torch.no_grad():
        model(EIGHT[:1, :1])
        before = there(model).limit
        out = model(ids, use_cache=True)
        assert torch.equal(out.logits, reference(ids).logits)
        during = there(model).limit
        assert during < before and there(model).count * there(model).slot_bytes <= during
        del out
        gc.collect()
        model(EIGHT[:1, :1])
        assert there(model).limit == before
    finish(model, processor)


def test_memory_that_the_device_has_not_got_leaves_fewer_experts(saved, monkeypatch, nothing_left):
    folder = saved("qwen3_moe")
    reference = architectures.reference("qwen3_moe", folder)
    processor = staged(2)
    total = architectures.parameter_bytes(reference)
    model = run_within(folder, processor, 4 * total, 2 * total, offload="nvme")
    device = model.zinfer._streaming.coordinator.device
    own_arena, given = device.own_arena, []

    def scarce(nbytes: int):
        if nbytes == there(model)._nbytes:
            if len(given) == 3:
                return None
            given.append(nbytes)
        return own_arena(nbytes)

    device.own_arena = scarce
    with torch.no_grad():
        for ids in (EIGHT, EIGHT[:1], EIGHT):
            assert torch.equal(reference(ids).logits, model(ids).logits)
    assert there(model).allowed == 3 and there(model).count <= 3
    del device.own_arena
    finish(model, processor)
