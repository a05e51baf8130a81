"""What the pool promises about sizes, limits, counts, waiting, closing and forking."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import zinfer.pinned
from tests.interpreters import LIBRARIES_ONLY
from zinfer.errors import BudgetError, ClosedError, OptionError
from zinfer.pinned import Pool

PAGE = 4096
MIB = 1 << 20


def small_pool(pages=16):
    return Pool(pages * PAGE, page_lock="off", touch_threads=1)


def run_python(code):
    """Runs `code` in a fresh interpreter, where a fork meets no thread of this test run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", LIBRARIES_ONLY + textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_pool_and_region():
    assert zinfer.pinned.__all__ == ["Pool", "Region"]


def test_capacity_and_regions_are_rounded_up_to_pages():
    pool = Pool(5 * PAGE + 1, page_lock="off")
    assert pool.capacity == 6 * PAGE
    region = pool.acquire(PAGE + 1)
    assert region.nbytes == 2 * PAGE
    assert region.address % PAGE == 0
    assert len(memoryview(region)) == 2 * PAGE


def test_the_counts_follow_what_is_out():
    pool = small_pool(8)
    first, second = pool.acquire(PAGE), pool.acquire(3 * PAGE)
    assert (pool.in_use, pool.free_bytes, pool.largest_free) == (4 * PAGE, 4 * PAGE, 4 * PAGE)
    assert pool.acquire(5 * PAGE) is None
    del first
    assert (pool.in_use, pool.free_bytes, pool.largest_free) == (3 * PAGE, 5 * PAGE, 4 * PAGE)
    assert pool.peak_in_use == 4 * PAGE
    assert pool.stats == {
        "acquires": 2, "releases": 1, "refusals": 1, "waits": 0, "peak_in_use": 4 * PAGE, "regions": 1,
    }  # fmt: skip
    del second
    assert pool.largest_free == pool.capacity
    pool.check_integrity()


def test_a_refused_request_fits_once_its_neighbours_are_joined():
    pool = small_pool(4)
    regions = [pool.acquire(PAGE) for _ in range(4)]
    del regions[0]
    regions.pop(1)  # the third: two holes, not one
    assert pool.free_bytes == 2 * PAGE
    assert pool.acquire(2 * PAGE) is None
    regions.pop(0)
    assert pool.acquire(3 * PAGE) is not None


@pytest.mark.parametrize("capacity", [0, -1, -(1 << 70)])
def test_a_capacity_below_one_is_a_value_error(capacity):
    with pytest.raises(ValueError, match="capacity"):
        Pool(capacity)


@pytest.mark.parametrize(
    "options",
    [
        {"page_lock": "perhaps"},
        {"touch_threads": -1},
        {"touch_threads": -3},
        {"slab_bytes": 0},
        {"slab_bytes": -2 * MIB},
        {"slab_bytes": 3 * MIB},
        {"slab_bytes": 1 << 70},
        {"slab_bytes": 1024 * MIB + 2 * MIB},
        {"numa_node": -1},
    ],
)
def test_an_option_out_of_range_is_named(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Pool(PAGE, **options)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_request_below_one_byte_is_a_value_error(nbytes):
    with pytest.raises(ValueError, match="nbytes"):
        small_pool().acquire(nbytes)


@pytest.mark.parametrize("timeout", [-1.0, math.nan])
def test_a_timeout_that_is_no_duration_is_a_value_error(timeout):
    with pytest.raises(ValueError, match="timeout"):
        small_pool().acquire(PAGE, timeout=timeout)


@pytest.mark.parametrize("timeout", [0.0, 60.0])
def test_a_request_beyond_the_capacity_is_a_budget_error_at_once(timeout):
    with pytest.raises(BudgetError, match=f"{17 * PAGE}.*{16 * PAGE}"):
        small_pool(16).acquire(16 * PAGE + 1, timeout=timeout)
    with pytest.raises(BudgetError, match=f"cannot fit.*{16 * PAGE}"):
        small_pool(16).acquire(1 << 70, timeout=timeout)


@pytest.mark.parametrize("capacity", [1 << 50, (1 << 63) - 1, 1 << 63, 1 << 70])
def test_a_pool_larger_than_the_address_space_is_a_budget_error_with_size_and_errno(capacity):
    with pytest.raises(BudgetError, match=r"cannot map \d+ bytes .*errno 12"):
        Pool(capacity)


def test_a_size_that_is_no_integer_is_a_type_error():
    for wrong in (1.5, "4096", None):
        with pytest.raises(TypeError, match="integer"):
            Pool(wrong)


def test_a_pool_that_the_machine_could_never_hold_is_a_budget_error_before_a_page_is_touched():
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this kernel promises memory without looking at what it has")
    # Were it granted, it would be touched: then this child dies of its CPU limit, or is the first to be killed.
    output = run_python("""
        import resource
        from pathlib import Path
        from zinfer.errors import BudgetError
        from zinfer.pinned import Pool

        Path("/proc/self/oom_score_adj").write_text("1000")
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        try:
            Pool(1 << 45, page_lock="off", huge_pages=False, touch_threads=1)
        except BudgetError as error:
            print(error)
    """)
    assert f"cannot map {1 << 45} bytes" in output and "mprotect" in output and "max_memory" in output


def test_a_large_pool_sits_on_huge_pages_and_aligned():
    pool = Pool(8 * MIB, page_lock="off")
    region = pool.acquire(8 * MIB)
    assert region.address % (2 * MIB) == 0
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("transparent huge pages are off on this machine")
    if pool.huge_bytes == 0:
        pytest.skip("the kernel had no huge page to give")
    assert pool.huge_bytes <= pool.capacity


def test_a_slab_is_a_gibibyte_unless_told_otherwise():
    assert Pool(PAGE, page_lock="off").slab_bytes == 1 << 30
    assert Pool(PAGE, page_lock="off", slab_bytes=2 * MIB).slab_bytes == 2 * MIB


def test_many_slabs_are_one_range_of_addresses_and_all_of_it_a_region():
    pool = Pool(9 * MIB + PAGE, page_lock="off", slab_bytes=2 * MIB)
    region = pool.acquire(pool.capacity)
    assert region.address == pool.base_address
    assert region.nbytes == pool.capacity == 9 * MIB + PAGE
    assert memoryview(region).tobytes() == bytes(pool.capacity)
    del region
    pool.close()
    assert pool.base_address == 0


def test_huge_bytes_are_what_the_kernel_counts_for_the_whole_process():
    before = huge_bytes_of_the_process()
    pool = Pool(16 * MIB, page_lock="off", slab_bytes=4 * MIB)
    assert huge_bytes_of_the_process() - before == pool.huge_bytes
    plain = Pool(16 * MIB, page_lock="off", slab_bytes=4 * MIB, huge_pages=False)
    assert plain.huge_bytes == 0
    assert huge_bytes_of_the_process() - before == pool.huge_bytes


def huge_bytes_of_the_process():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not count huge pages")


def test_huge_bytes_are_unknown_where_smaps_cannot_be_read():
    output = run_python("""
        import os, resource
        from zinfer.pinned import Pool

        pool = Pool(4096, page_lock="off")
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, lowest_free))
        print(pool.huge_bytes)
    """)
    assert output == "None\n"


def test_huge_pages_are_not_used_when_they_are_not_wanted():
    assert Pool(8 * MIB, page_lock="off", huge_pages=False).huge_bytes == 0


def test_huge_bytes_count_this_pool_only():
    pools = [Pool(4 * MIB, page_lock="off", huge_pages=wanted) for wanted in (True, True, False)]
    assert pools[0].huge_bytes <= 4 * MIB
    assert pools[1].huge_bytes <= 4 * MIB
    assert pools[2].huge_bytes == 0


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("capacity", [PAGE, 2 * MIB, 6 * MIB + PAGE])
def test_fresh_memory_reads_as_zeros_however_it_was_touched(capacity, threads):
    pool = Pool(capacity, page_lock="off", touch_threads=threads)
    assert bytes(pool.acquire(capacity)) == bytes(capacity)


def test_every_page_is_present_before_the_first_use():
    before = resident_bytes()
    pool = Pool(64 * MIB, page_lock="off")
    assert resident_bytes() - before > 60 * MIB
    pool.close()
    assert resident_bytes() - before < 32 * MIB


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_a_waiting_acquire_is_woken_by_a_release_on_another_thread():
    pool = small_pool(4)
    holder = [pool.acquire(4 * PAGE)]
    timer = threading.Timer(0.2, holder.clear)
    timer.start()
    start = time.monotonic()
    region = pool.acquire(PAGE, timeout=30)
    assert region is not None
    assert 0.1 < time.monotonic() - start < 10
    timer.join()
    assert pool.stats["waits"] == 1
    assert pool.stats["refusals"] == 0


def test_a_wait_ends_with_none_after_its_timeout():
    pool = small_pool(1)
    region = pool.acquire(PAGE)
    start = time.monotonic()
    assert pool.acquire(PAGE, timeout=0.25) is None
    assert 0.24 < time.monotonic() - start < 10
    assert pool.stats["waits"] == pool.stats["refusals"] == 1
    assert region.nbytes == PAGE


def test_a_signal_ends_a_wait_soon_and_leaves_nothing_behind():
    pool = small_pool(1)
    region = pool.acquire(PAGE)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            pool.acquire(PAGE, timeout=math.inf)
        assert time.monotonic() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    del region
    assert pool.free_bytes == pool.capacity


def test_closing_wakes_a_waiter_with_closed_error():
    pool = small_pool(1)
    region = pool.acquire(PAGE)
    timer = threading.Timer(0.1, pool.close)
    timer.start()
    with pytest.raises(ClosedError):
        pool.acquire(PAGE, timeout=30)
    timer.join()
    assert region.nbytes == PAGE


def test_a_closed_pool_stays_mapped_until_its_last_region_dies():
    pool = small_pool(4)
    region = pool.acquire(PAGE)
    view = memoryview(region)
    address = region.address
    pool.close()
    pool.close()
    with pytest.raises(ClosedError):
        pool.acquire(PAGE)
    view[:] = b"x" * PAGE
    assert bytes(view) == b"x" * PAGE
    assert is_mapped(address)
    del region, view
    assert not is_mapped(address)
    assert pool.huge_bytes == 0
    assert (pool.page_locked, pool.page_lock_reason) == (False, "the pool is closed")
    pool.check_integrity()


def test_a_pool_with_no_region_out_is_unmapped_by_close():
    pool = small_pool(4)
    address = pool.acquire(PAGE).address
    assert is_mapped(address)
    pool.close()
    assert not is_mapped(address)


def test_a_region_outlives_the_name_of_its_pool():
    region = small_pool(4).acquire(PAGE)
    address = region.address
    memoryview(region)[0] = 7
    assert memoryview(region)[0] == 7
    del region
    assert not is_mapped(address)


def is_mapped(address):
    """Whether `address` can be read and written, by /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(edge, 16) for edge in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[1].startswith("rw")
    return False


def test_a_forked_child_can_use_nothing_and_harms_nothing():
    output = run_python("""
        import os
        from zinfer.errors import ClosedError
        from zinfer.pinned import COMPILED, Pool

        def refuses(action, error=ClosedError):
            try:
                action()
            except error:
                return True
            return False

        pool = Pool(16 * 4096, page_lock="off")
        region = pool.acquire(4096)
        memoryview(region)[:] = b"p" * 4096
        child = os.fork()
        if child == 0:
            ok = refuses(lambda: pool.acquire(4096)) and refuses(lambda: pool.acquire(4096, timeout=9))
            ok = ok and refuses(lambda: pool.free_bytes) and refuses(pool.check_integrity)
            # A portable region is an array, which cannot refuse a view; touching one is told of below.
            ok = ok and (not COMPILED or refuses(lambda: memoryview(region), BufferError))
            pool.close()
            del region, pool
            fresh = Pool(4096, page_lock="off")  # a child may have a pool of its own
            ok = ok and fresh.acquire(4096) is not None
            os._exit(0 if ok else 1)
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
        assert bytes(region) == b"p" * 4096
        del region
        pool.check_integrity()
        assert pool.free_bytes == pool.capacity
        pool.close()
        print("fine")
    """)
    assert output == "fine\n"


def test_the_memory_is_not_mapped_in_a_forked_child():
    output = run_python("""
        import os
        from zinfer.pinned import Pool

        view = memoryview(Pool(4096, page_lock="off").acquire(4096))
        child = os.fork()
        if child == 0:
            view[0]
            os._exit(0)
        print(os.waitpid(child, 0)[1] != 0)  # SIGSEGV, or what a sanitizer makes of it
    """)
    assert output == "True\n"
