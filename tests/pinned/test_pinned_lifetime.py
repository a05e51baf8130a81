"""A run returns exactly when the last thing that can see it is gone."""

import gc
import threading
import weakref

import pytest
import torch

from zinfer.pinned import Pool

PAGE = 4096


@pytest.fixture
def pool():
    pool = Pool(16 * PAGE, page_lock="off")
    yield pool
    gc.collect()
    pool.check_integrity()
    assert pool.stats["regions"] == 0


def test_a_tensor_over_a_region_shares_its_bytes(pool):
    region = pool.acquire(PAGE)
    tensor = torch.frombuffer(region, dtype=torch.float32, count=10, offset=64)
    assert tensor.data_ptr() == region.address + 64
    tensor.fill_(1.5)
    assert memoryview(region)[64:].cast("f")[9] == 1.5
    memoryview(region)[64:68] = bytes(4)
    assert tensor[0] == 0


def test_the_buffer_is_writable_flat_and_of_bytes(pool):
    view = memoryview(pool.acquire(2 * PAGE))
    assert (view.readonly, view.ndim, view.format, view.itemsize) == (False, 1, "B", 1)
    assert (view.nbytes, view.contiguous) == (2 * PAGE, True)


def test_a_tensor_keeps_the_run_and_returns_it_with_its_last_view(pool):
    region = pool.acquire(4 * PAGE)
    tensor = torch.frombuffer(region, dtype=torch.bfloat16, count=1000)
    gone = weakref.ref(region)
    del region
    assert pool.in_use == 4 * PAGE
    view = tensor.view(10, 100)[3:5].transpose(0, 1)
    del tensor
    assert pool.in_use == 4 * PAGE
    storage = view.untyped_storage()
    del view
    assert pool.in_use == 4 * PAGE
    assert gone() is not None
    del storage
    assert pool.in_use == 0
    assert gone() is None


def test_a_parameter_and_a_detached_alias_keep_the_run(pool):
    parameter = torch.nn.Parameter(torch.frombuffer(pool.acquire(PAGE), dtype=torch.float32))
    alias = parameter.detach()
    del parameter
    assert pool.in_use == PAGE
    del alias
    assert pool.in_use == 0


def test_a_tensor_saved_for_backward_keeps_the_run(pool):
    weight = torch.frombuffer(pool.acquire(PAGE), dtype=torch.float32, count=4).fill_(2)
    x = torch.ones(4, requires_grad=True)
    loss = (x * weight).sum()
    del weight
    assert pool.in_use == PAGE
    loss.backward()
    assert x.grad.tolist() == [2, 2, 2, 2]
    del loss
    assert pool.in_use == 0


def test_a_memoryview_and_its_slices_keep_the_run(pool):
    view = memoryview(pool.acquire(PAGE))[100:200]
    assert pool.in_use == PAGE
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    del view
    assert pool.in_use == PAGE
    del tensor
    assert pool.in_use == 0


def test_a_numpy_array_of_a_tensor_keeps_the_run(pool):
    array = torch.frombuffer(pool.acquire(PAGE), dtype=torch.int64).numpy()[::2]
    assert pool.in_use == PAGE
    del array
    assert pool.in_use == 0


def test_a_run_may_return_from_a_thread_that_never_saw_the_pool(pool):
    tensors = [torch.frombuffer(pool.acquire(PAGE), dtype=torch.uint8) for _ in range(5)]
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert pool.in_use == 0


def test_a_run_in_a_reference_cycle_returns_with_the_collector(pool):
    cycle = [pool.acquire(PAGE)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.in_use == 0


def test_a_tensor_outlives_the_close_of_the_pool_and_its_name():
    pool = Pool(16 * PAGE, page_lock="off")
    tensor = torch.frombuffer(pool.acquire(PAGE), dtype=torch.int32)
    pool.close()
    del pool
    gc.collect()
    assert tensor.fill_(7).sum() == 7 * PAGE // 4


def test_a_region_cannot_be_made_by_hand():
    from zinfer.pinned import Region

    with pytest.raises(TypeError):
        Region()
