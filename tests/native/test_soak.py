"""Random requests through scripted faults; a million by hand: `--requests 1000000`."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from .compiling import AIO, PINNED, compile_program, has_io_uring, needs_compiler

RAM = Path("/dev/shm")


@pytest.fixture
def quick_folder(tmp_path):
    """In memory where possible: the faults are the script's, the drive would only take time."""
    if not os.access(RAM, os.W_OK):
        yield tmp_path
        return
    folder = tempfile.mkdtemp(prefix="zinfer-soak-", dir=RAM)
    yield folder
    shutil.rmtree(folder)


@needs_compiler
def test_every_byte_is_right_or_an_error_and_nothing_is_left_over(objects, quick_folder, pytestconfig):
    requests = pytestconfig.getoption("--requests")
    program = compile_program("aio_soak", [*AIO, *PINNED], objects, ["-O1", "-g"], has_io_uring())
    command = [str(program), str(quick_folder), str(requests), str(requests % 1000)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    served, failed, cancelled = (int(part.split()[0]) for part in done.stdout.split(",")[:3])
    assert served + failed + cancelled == requests
    assert min(served, failed, cancelled) > 0
