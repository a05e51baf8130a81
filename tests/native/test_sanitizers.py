"""The native I/O engine and the pinned pool under AddressSanitizer and LeakSanitizer, UndefinedBehaviorSanitizer and
ThreadSanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from .compiling import AIO, COMPILER, PINNED, compile_program, has_io_uring, needs_compiler, works

pytestmark = needs_compiler

SOURCES = {"aio_stress": AIO, "aio_soak": [*AIO, *PINNED], "pool_soak": PINNED}


def build(sanitizer: str, folder: Path, objects: Path, uring: bool, name: str = "aio_stress") -> Path:
    """Compile and link a program; skips where the compiler lacks the sanitizer."""
    chosen = [f"-fsanitize={sanitizer}", *(["-fno-sanitize-recover=all"] * ("undefined" in sanitizer))]
    flags = ["-O1", "-g", *(chosen if sanitizer != "leak" else [])]  # which works by what is linked alone
    links = chosen if sanitizer == "leak" else []
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [COMPILER, *flags, *links, str(probe), "-o", str(folder / "probe")]
    for part in (command, [str(folder / "probe")]):
        probed = subprocess.run(part, capture_output=True, text=True, check=False)
        if probed.returncode != 0:  # LeakSanitizer, for one, does not work where ptrace is refused or in use
            pytest.skip(f"{COMPILER} has no working -fsanitize={sanitizer}: {probed.stderr[-500:]}")
    return compile_program(name, SOURCES[name], objects, flags, uring, tuple(links))


def run(program: Path, *arguments: str) -> None:
    # Leaks are what the builds with "leak" look for: where they cannot, the other sanitizers still work.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [str(program), *arguments],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def every_backend() -> list[str]:
    return ["threads", "faults"] + ["libaio"] * works("libaio") + ["io_uring"] * has_io_uring()


BOTH = "address,undefined"  # which one build can have


@pytest.mark.parametrize("sanitizer", [BOTH, "leak"])
def test_a_sanitizer_finds_nothing(tmp_path, objects, sanitizer):
    run(build(sanitizer, tmp_path, objects, has_io_uring()), str(tmp_path / "words"), *every_backend())


def test_the_thread_sanitizer_finds_nothing(tmp_path, objects):
    # Not io_uring and libaio: the kernel's writes and its ring's ordering are invisible to this sanitizer.
    run(build("thread", tmp_path, objects, uring=False), str(tmp_path / "words"), "threads", "faults")


@pytest.mark.parametrize("sanitizer", [BOTH, "leak", "thread"])
def test_a_sanitizer_finds_nothing_in_the_pool(tmp_path, objects, sanitizer):
    run(build(sanitizer, tmp_path, objects, uring=False, name="pool_soak"), "40000", "7")


def test_failed_and_cancelled_requests_leak_nothing(tmp_path, objects):
    run(build("leak", tmp_path, objects, has_io_uring(), name="aio_soak"), str(tmp_path), "2000", "7")
