"""The native I/O engine under AddressSanitizer and ThreadSanitizer."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zinfer.aio import Engine
from zinfer.errors import OptionError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "csrc/aio").glob("*.cpp")), ROOT / "tests/native/aio_stress.cpp"]
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or not SOURCES[0].exists(), reason="no compiler or no native sources here"
)


def has_io_uring() -> bool:
    engine = Engine()
    engine.close()
    return engine.backend == "io_uring" and Path("/usr/include/liburing.h").exists()


def has_libaio() -> bool:
    try:
        Engine("libaio").close()
    except OptionError:
        return False
    return True


def build(sanitizer: str, folder: Path, uring: bool) -> Path:
    """Compile and link the stress program; skips where the compiler lacks the sanitizer."""
    skipped = {"bindings.cpp"} | (set() if uring else {"io_uring_backend.cpp"})
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-DZINFER_HAS_LIBURING={int(uring)}"]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *flags, "-c", str(source), "-o", str(target)], check=True, timeout=120)
        return str(target)

    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    probed = subprocess.run(
        [COMPILER, *flags, str(probe), "-o", str(folder / "probe")], capture_output=True, check=False
    )
    if probed.returncode != 0 or subprocess.run([str(folder / "probe")], check=False).returncode != 0:
        pytest.skip(f"{COMPILER} has no working -fsanitize={sanitizer}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [source for source in SOURCES if source.name not in skipped]))
    program = folder / "aio_stress"
    links = ["-luring"] if uring else []
    subprocess.run([COMPILER, *flags, *objects, "-o", str(program), *links], check=True, timeout=120)
    return program


def run(program: Path, backends: list[str]) -> None:
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [str(program), str(program.parent / "words"), *backends],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_address_sanitizer_finds_nothing(tmp_path):
    uring = has_io_uring()
    run(build("address", tmp_path, uring), ["threads", "faults"] + ["libaio"] * has_libaio() + ["io_uring"] * uring)


def test_the_thread_sanitizer_finds_nothing(tmp_path):
    # Not io_uring: the kernel's writes and its ring's ordering are invisible to this sanitizer.
    run(build("thread", tmp_path, uring=False), ["threads", "faults"])
