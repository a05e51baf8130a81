"""Page-locking, against a scripted CUDA runtime that the test compiles itself."""

import ctypes
import shutil
import subprocess
import threading

import pytest

from zinfer.errors import BudgetError
from zinfer.pinned import COMPILED, Pool

PAGE = 4096
SLAB = 2 << 20

COMPILED_ONLY = True
pytestmark = pytest.mark.skipif(not COMPILED, reason="only the compiled pool page-locks")

SOURCE = r"""
#include <cstddef>
extern "C" {
int devices = 1, count_result = 0, register_result = 0;  // the script
int calls_before_failure = 0;                            // that many registrations succeed all the same
int registered = 0, unregistered = 0, cleared = 0;       // the record
int strangers = 0;                                       // unregistered, but not registered before
void* bases[64];
void* last_base = nullptr;
size_t last_bytes = 0;
unsigned last_flags = 0;
thread_local int current = 0;                            // a device, the thread's choice
int choices = 0, get_result = 0;
int owners[64];                                          // the device that was current, of each registration
int elsewhere = 0;                                       // unregistered while another device was current

int cudaGetDevice(int* device) { *device = current; return get_result; }
int cudaSetDevice(int device) { current = device; ++choices; return 0; }
int cudaGetDeviceCount(int* count) { *count = devices; return count_result; }
int cudaHostRegister(void* base, size_t bytes, unsigned flags) {
  if (register_result != 0 && calls_before_failure-- <= 0) return register_result;
  last_base = base; last_bytes = bytes; last_flags = flags;
  owners[registered] = current;
  bases[registered++] = base;
  return 0;
}
int cudaHostUnregister(void* base) {
  // Unregistering after unmapping would be a fault: touch the memory.
  for (void*& known : bases) {
    if (known != base) continue;
    *static_cast<volatile char*>(base) = 1;
    known = nullptr;
    elsewhere += owners[&known - bases] != current;
    ++unregistered;
    return 0;
  }
  ++strangers;
  return 0;
}
const char* cudaGetErrorString(int error) { return error == 2 ? "out of memory" : "some error"; }
#ifdef WITH_LAST_ERROR
int cudaGetLastError() { ++cleared; return 0; }
#endif
}
"""


class FakeRuntime:
    """The library's variables, read and set through ctypes."""

    def __init__(self, path):
        object.__setattr__(self, "library", ctypes.CDLL(str(path)))
        for name in (
            "devices", "count_result", "register_result", "calls_before_failure",
            "registered", "unregistered", "cleared", "strangers", "choices", "get_result", "elsewhere",
        ):  # fmt: skip
            setattr(self, name, 1 if name == "devices" else 0)
        ctypes.memset((ctypes.c_void_p * 64).in_dll(self.library, "bases"), 0, 64 * 8)

    def __getattr__(self, name):
        kind = {"last_bytes": ctypes.c_size_t, "last_base": ctypes.c_void_p}.get(name, ctypes.c_int)
        return kind.in_dll(self.library, name).value

    def __setattr__(self, name, value):
        ctypes.c_int.in_dll(self.library, name).value = value


def compile_library(folder, name, source, *flags):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the scripted CUDA runtime with")
    code, library = folder / f"{name}.cpp", folder / f"{name}.so"
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", *flags, str(code), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module", params=["with cudaGetLastError", "without cudaGetLastError"])
def library(request, tmp_path_factory):
    flags = ["-DWITH_LAST_ERROR"] if request.param.startswith("with ") else []
    return compile_library(tmp_path_factory.mktemp("cudart"), "fake", SOURCE, *flags)


@pytest.fixture
def runtime(library, monkeypatch):
    monkeypatch.setenv("ZINFER_CUDART", str(library))
    runtime = FakeRuntime(library)
    yield runtime
    runtime.library.cudaSetDevice(0)
    assert runtime.elsewhere == 0
    assert runtime.strangers == 0


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_the_whole_pool_is_registered_once_for_every_device(runtime, mode):
    pool = Pool(8 * PAGE, page_lock=mode)
    assert (pool.page_locked, pool.page_lock_reason) == (True, "")
    assert (runtime.registered, runtime.last_bytes, runtime.last_flags) == (1, 8 * PAGE, 1)
    assert runtime.last_base == pool.acquire(PAGE).address


def test_close_unregisters_before_it_unmaps(runtime):
    pool = Pool(8 * PAGE)
    pool.close()
    pool.close()
    assert runtime.unregistered == 1
    assert not pool.page_locked


def test_a_closed_pool_stays_registered_until_its_last_region_dies(runtime):
    pool = Pool(8 * PAGE)
    region = pool.acquire(PAGE)
    pool.close()
    assert runtime.unregistered == 0
    assert pool.page_locked
    del region
    assert runtime.unregistered == 1


def test_a_pool_that_is_dropped_unregisters_too(runtime):
    region = Pool(8 * PAGE).acquire(PAGE)
    assert runtime.unregistered == 0
    del region
    assert runtime.unregistered == 1


def current_device(runtime):
    device = ctypes.c_int(-1)
    runtime.library.cudaGetDevice(ctypes.byref(device))
    return device.value


@pytest.mark.parametrize("way", ["close", "the last region, on another thread", "the last region"])
def test_slabs_are_unregistered_with_the_device_that_was_current_and_no_thread_loses_its_own(runtime, way):
    runtime.devices = 4
    runtime.library.cudaSetDevice(2)
    pool = Pool(3 * SLAB, slab_bytes=SLAB)
    held = [] if way == "close" else [pool.acquire(PAGE)]
    runtime.library.cudaSetDevice(1)
    pool.close()
    if way.endswith("thread"):
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
    held.clear()
    assert (runtime.unregistered, runtime.elsewhere) == (3, 0)
    assert current_device(runtime) == 1


def test_where_the_device_is_the_current_one_nobody_chooses_it(runtime):
    runtime.library.cudaSetDevice(1)
    runtime.choices = 0
    Pool(8 * PAGE).close()
    assert (runtime.unregistered, runtime.choices) == (1, 0)


def test_a_runtime_that_cannot_tell_the_device_is_the_reason(runtime):
    runtime.get_result = 3
    assert Pool(8 * PAGE).page_lock_reason == "cudaGetDevice: some error (cudaError 3)"
    assert runtime.registered == 0


def test_off_never_calls_the_runtime(runtime):
    pool = Pool(8 * PAGE, page_lock="off")
    assert (pool.page_locked, runtime.registered) == (False, 0)
    assert "off" in pool.page_lock_reason


def test_a_refused_registration_is_reported_and_the_pool_works_pageable(runtime):
    runtime.register_result = 2
    pool = Pool(8 * PAGE)
    assert not pool.page_locked
    assert pool.page_lock_reason == (
        f"cudaHostRegister of slab 1 of 1, {8 * PAGE} bytes: out of memory (cudaError 2)"
    )
    memoryview(pool.acquire(PAGE))[0] = 1
    pool.close()
    assert runtime.unregistered == 0


def test_a_refused_registration_is_taken_out_of_the_runtimes_memory(runtime):
    runtime.register_result = 2
    Pool(8 * PAGE)
    assert runtime.cleared == int(hasattr(runtime.library, "cudaGetLastError"))


def test_on_raises_with_the_reason_when_registration_is_refused(runtime):
    runtime.register_result = 2
    with pytest.raises(BudgetError, match=f'{8 * PAGE} bytes.*out of memory.*page_lock="auto"'):
        Pool(8 * PAGE, page_lock="on")
    assert runtime.unregistered == 0


def three_slabs_and_a_page(mode="auto"):
    return Pool(3 * SLAB + PAGE, page_lock=mode, slab_bytes=SLAB)


def registered_bases(runtime):
    return [base for base in (ctypes.c_void_p * 64).in_dll(runtime.library, "bases") if base]


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_every_slab_is_registered_by_itself_and_the_last_may_be_short(runtime, mode):
    pool = three_slabs_and_a_page(mode)
    assert (pool.page_locked, pool.locked_bytes, pool.page_lock_reason) == (True, pool.capacity, "")
    assert registered_bases(runtime) == [pool.base_address + number * SLAB for number in range(4)]
    assert runtime.last_bytes == PAGE
    pool.close()
    assert (runtime.unregistered, registered_bases(runtime)) == (4, [])


@pytest.mark.parametrize("locked", [1, 2, 3])
def test_auto_keeps_the_slabs_locked_before_the_one_that_was_refused(runtime, locked):
    runtime.register_result, runtime.calls_before_failure = 2, locked
    pool = three_slabs_and_a_page()
    assert (pool.page_locked, pool.locked_bytes) == (False, locked * SLAB)
    size = PAGE if locked == 3 else SLAB
    assert pool.page_lock_reason == (
        f"cudaHostRegister of slab {locked + 1} of 4, {size} bytes: out of memory (cudaError 2)"
    )
    assert registered_bases(runtime) == [pool.base_address + number * SLAB for number in range(locked)]
    memoryview(pool.acquire(pool.capacity))[-1] = 1
    pool.close()
    assert (runtime.unregistered, registered_bases(runtime)) == (locked, [])
    assert (pool.page_locked, pool.locked_bytes) == (False, 0)


@pytest.mark.parametrize("locked", [1, 3])
def test_on_unregisters_the_slabs_before_the_one_that_was_refused_and_raises(runtime, locked):
    runtime.register_result, runtime.calls_before_failure = 2, locked
    with pytest.raises(BudgetError, match=rf"slab {locked + 1} of 4.*out of memory"):
        three_slabs_and_a_page("on")
    assert (runtime.registered, runtime.unregistered) == (locked, locked)


def test_no_device_leaves_the_memory_pageable(runtime):
    runtime.devices = 0
    assert Pool(8 * PAGE).page_lock_reason == "the CUDA runtime sees no device"
    assert runtime.registered == 0


def test_a_failing_device_count_is_the_reason(runtime):
    runtime.count_result = 100
    assert Pool(8 * PAGE).page_lock_reason == "cudaGetDeviceCount: some error (cudaError 100)"


def test_a_library_that_cannot_be_loaded_is_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("ZINFER_CUDART", str(tmp_path / "missing.so"))
    pool = Pool(8 * PAGE)
    assert not pool.page_locked
    assert "ZINFER_CUDART" in pool.page_lock_reason
    assert "missing.so" in pool.page_lock_reason
    with pytest.raises(BudgetError, match=r"missing\.so"):
        Pool(8 * PAGE, page_lock="on")


def test_a_library_that_is_no_cuda_runtime_is_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("ZINFER_CUDART", str(compile_library(tmp_path, "empty", "int nothing;\n")))
    assert "has no cuda" in Pool(8 * PAGE).page_lock_reason


def test_auto_without_an_override_locks_or_says_why(monkeypatch):
    monkeypatch.delenv("ZINFER_CUDART", raising=False)
    pool = Pool(8 * PAGE)
    assert pool.page_locked == (pool.page_lock_reason == "")
