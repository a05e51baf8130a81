"""Builds the native test programs out of the library's own sources."""

import hashlib
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


def compile_program(
    name: str, sources: list[Path], objects: Path, flags: list[str], uring: bool, links: tuple[str, ...] = ()
) -> Path:
    """Compile and link tests/native/<name>.cpp with `sources`, the Python bindings left out.

    What was compiled with the same flags lies in `objects` already, and is not compiled again.
    """
    skipped = {"bindings.cpp"} | (set() if uring else {"io_uring_backend.cpp"})
    flags = ["-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", *flags]

    def compile_one(source: Path) -> str:
        ours = [*flags, *([f"-DZINFER_HAS_LIBURING={int(uring)}"] * (source.parent.name == "aio"))]
        target = objects / f"{source.parent.name}-{source.stem}-{digest(ours)}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")  # another process may be at it
            subprocess.run([COMPILER, *ours, "-c", str(source), "-o", str(part)], check=True, timeout=120)
            part.rename(target)
        return str(target)

    wanted = [source for source in sources if source.name not in skipped]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, [*wanted, ROOT / f"tests/native/{name}.cpp"]))
    program = objects / f"{name}-{digest([*flags, *links, str(uring)])}"
    libraries = ["-ldl", *(["-luring"] if uring else [])]
    if not program.exists():
        part = program.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [COMPILER, *flags, *links, *compiled, "-o", str(part), *libraries], check=True, timeout=120
        )
        part.rename(program)
    return program


def digest(flags: list[str]) -> str:
    return hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16]
