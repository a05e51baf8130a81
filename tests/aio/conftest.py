"""Files whose every 8-byte word holds its own offset, buffers with canaries, engines checked at the end.

Every test of a module that names `Engine` or `File` runs with the compiled classes of that name and with the
portable ones: two implementations that share no code and must do the same.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import zinfer
import zinfer.aio.drives
from tests.interpreters import LIBRARIES_ONLY
from zinfer.aio import Engine, File, portable
from zinfer.aio.portable import split
from zinfer.errors import OptionError

from . import scripted

DEADLINE = 20.0
CANARY = 0xA5
ALIGNMENT = 4096


def word_bytes(length: int) -> bytes:
    words = numpy.arange(0, length + 8, 8, dtype=numpy.uint64)
    return words.tobytes()[:length]


class Memory:
    """Page-aligned memory full of canaries; `view` is its bytes."""

    def __init__(self, length: int) -> None:
        self.map = mmap.mmap(-1, max(length, 1) + ALIGNMENT)
        self.view = numpy.frombuffer(self.map, dtype=numpy.uint8)
        self.view[:] = CANARY
        self.address = self.view.ctypes.data
        assert self.address % ALIGNMENT == 0

    def bytes_at(self, start: int, length: int) -> bytes:
        return ctypes.string_at(self.address + start, length)

    def untouched(self, start: int, end: int) -> bool:
        return bool((self.view[start:end] == CANARY).all())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder on a real drive: /tmp may be a tmpfs elsewhere, which only widens what is covered."""
    return tmp_path_factory.mktemp("aio")


@pytest.fixture(scope="session")
def make_file(folder):
    def make(length: int) -> str:
        path = folder / f"words-{length}"
        if not path.exists():
            path.write_bytes(word_bytes(length))
        return str(path)

    return make


@pytest.fixture
def words(make_file):
    """(path, contents) of a file of 3 MiB and a ragged tail."""
    length = 3 * (1 << 20) + 777
    return make_file(length), word_bytes(length)


if zinfer.aio.COMPILED:
    from zinfer.aio._native import _split
else:
    _split = split.split_rows

COMPILED = pytest.param(
    "compiled", marks=pytest.mark.skipif(not zinfer.aio.COMPILED, reason=zinfer.aio.PORTABLE_REASON)
)


def pytest_generate_tests(metafunc):
    """Both implementations, for the tests of modules that use either, but for those that are `compiled_only`."""
    if getattr(metafunc.function, "compiled_only", False):
        metafunc.parametrize("implementation", [COMPILED], indirect=True)
    elif any(hasattr(metafunc.module, name) for name in ("Engine", "File", "_split")):
        metafunc.parametrize("implementation", [COMPILED, "portable"], indirect=True)


@pytest.fixture(autouse=True)
def implementation(request, monkeypatch):
    """ "compiled" or "portable": whose classes the names of the test's module stand for; "" for those without."""
    chosen = getattr(request, "param", "")
    if chosen != "portable":
        return chosen
    backends = [request.node.callspec.params.get(name) for name in ("backend", "other")]
    if "io_uring" in backends:
        pytest.skip("io_uring needs the compiled module")
    if NO_LIBRARY and ("libaio" in backends or needs_libaio.mark in request.node.iter_markers("skipif")):
        pytest.skip(NO_LIBRARY)
    monkeypatch.setattr(scripted.engine, "make_backend", scripted.make_backend)
    theirs = {
        "Engine": portable.Engine,
        "File": portable.File,
        "Request": portable.Request,
        "_split": split.split_rows,
    }
    for module in (request.module, sys.modules[__name__], zinfer.aio.drives):
        for name, value in theirs.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    # What run_python starts: the same implementation, the same scripted backend.
    monkeypatch.setenv("ZINFER_PORTABLE", "1")
    return chosen


def _no_library() -> str:
    """Why the portable engine has no libaio, which it takes from the system's library; "" where it has."""
    try:
        portable.Engine("libaio").close()
    except OptionError as error:
        return str(error)
    return ""


NO_LIBRARY = _no_library()


def compiled_only(test):
    """A test of what only the compiled module has."""
    test.compiled_only = True
    return test


def needs(backend: str) -> pytest.MarkDecorator:
    """Skips where `backend` does not work, saying why."""
    try:
        Engine(backend).close()
    except OptionError as error:
        return pytest.mark.skipif(True, reason=str(error))
    return pytest.mark.skipif(False, reason="")


needs_io_uring, needs_libaio = needs("io_uring"), needs("libaio")
REAL = [pytest.param("io_uring", marks=needs_io_uring), pytest.param("libaio", marks=needs_libaio), "threads"]
BACKENDS = [*REAL, "faults"]


def skip_refused(backend: str, file: File) -> None:
    """Buffered files given to libaio are refused; test_libaio.py says so."""
    if backend == "libaio" and not file.direct:
        pytest.skip("libaio takes O_DIRECT files only")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def make_engine():
    """Engines that are closed and found whole after the test."""
    engines = []

    def make(backend="auto", **options):
        engines.append(Engine(backend, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
        engine.check_integrity()


def read(engine: Engine, file: File, offset: int, length: int, memory: Memory, start=0, slack=False):
    return engine.read([(file, offset, length, memory.address + start, slack)], memory)


def run_python(code: str, *arguments: str, **options) -> subprocess.Popen:
    root = str(Path(zinfer.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    if os.environ.get("ZINFER_PORTABLE") == "1":
        code = f"from tests.aio import scripted\nscripted.install()\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", LIBRARIES_ONLY + code, *arguments],
        env=environment,
        cwd=root,  # not the caller's folder: `-c` puts it first on the path
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


PRELUDE = """
import errno, sys, time
from tests.aio.conftest import Memory, read
from tests.aio.seccomp import refuse
from zinfer.aio import Engine, File
from zinfer.errors import DriveError, OptionError
path, contents = sys.argv[1], open(sys.argv[1], "rb").read()
def serves(engine, file):
    memory = Memory(len(contents))
    assert read(engine, file, 0, len(contents), memory).wait(10)
    return memory.bytes_at(0, len(contents)) == contents
"""


def run_refused(code: str, words: tuple[str, bytes], *arguments: str) -> None:
    """Runs `code` behind PRELUDE in a process of its own, which may give up rights for good."""
    process = run_python(PRELUDE + code, words[0], *arguments)
    try:
        _, errors = process.communicate(timeout=2 * DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0, errors
