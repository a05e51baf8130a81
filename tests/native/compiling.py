"""Builds the native test programs out of the library's own sources."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zinfer.aio import Engine
from zinfer.errors import OptionError

ROOT = Path(__file__).resolve().parents[2]
AIO, PINNED = (sorted((ROOT / "csrc" / part).glob("*.cpp")) for part in ("aio", "pinned"))
COMPILER = os.environ.get("CXX", "g++")

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None or not AIO, reason="no compiler or no native sources here"
)


def works(backend: str) -> bool:
    try:
        Engine(backend).close()
    except OptionError:
        return False
    return True


def has_io_uring() -> bool:
    return works("io_uring") and Path("/usr/include/liburing.h").exists()


def compile_program(name: str, sources: list[Path], folder: Path, flags: list[str], uring: bool) -> Path:
    """Compile and link tests/native/<name>.cpp with `sources`, the Python bindings left out."""
    skipped = {"bindings.cpp"} | (set() if uring else {"io_uring_backend.cpp"})
    flags = ["-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", f"-DZINFER_HAS_LIBURING={int(uring)}", *flags]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        subprocess.run([COMPILER, *flags, "-c", str(source), "-o", str(target)], check=True, timeout=120)
        return str(target)

    wanted = [source for source in sources if source.name not in skipped]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*wanted, ROOT / f"tests/native/{name}.cpp"]))
    program = folder / name
    links = ["-ldl", *(["-luring"] if uring else [])]
    subprocess.run([COMPILER, *flags, *objects, "-o", str(program), *links], check=True, timeout=120)
    return program
