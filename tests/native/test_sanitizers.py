"""The native I/O engine and the pinned pool under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from .compiling import AIO, COMPILER, PINNED, compile_program, has_io_uring, needs_compiler, works

pytestmark = needs_compiler


def build(sanitizer: str, folder: Path, uring: bool, name: str = "aio_stress") -> Path:
    """Compile and link a program; skips where the compiler lacks the sanitizer."""
    flags = [
        "-O1",
        "-g",
        f"-fsanitize={sanitizer}",
        *(["-fno-sanitize-recover"] * (sanitizer == "undefined")),
    ]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [COMPILER, *flags, str(probe), "-o", str(folder / "probe")]
    probed = subprocess.run(command, capture_output=True, check=False)
    if probed.returncode != 0 or subprocess.run([str(folder / "probe")], check=False).returncode != 0:
        pytest.skip(f"{COMPILER} has no working -fsanitize={sanitizer}")
    return compile_program(name, PINNED if name == "pool_soak" else AIO, folder, flags, uring)


def run(program: Path, *arguments: str) -> None:
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


@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_a_sanitizer_finds_nothing(tmp_path, sanitizer):
    run(build(sanitizer, tmp_path, has_io_uring()), str(tmp_path / "words"), *every_backend())


def test_the_thread_sanitizer_finds_nothing(tmp_path):
    # Not io_uring and libaio: the kernel's writes and its ring's ordering are invisible to this sanitizer.
    run(build("thread", tmp_path, uring=False), str(tmp_path / "words"), "threads", "faults")


@pytest.mark.parametrize("sanitizer", ["address", "undefined", "thread"])
def test_a_sanitizer_finds_nothing_in_the_pool(tmp_path, sanitizer):
    run(build(sanitizer, tmp_path, uring=False, name="pool_soak"), "40000", "7")
