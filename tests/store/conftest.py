"""A checkpoint, a second filesystem and second processes for the tests of the store."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from store_helpers import make_checkpoint

from tests.interpreters import LIBRARIES_ONLY


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "tiny-llama")


@pytest.fixture
def drive(tmp_path):
    """A folder on another filesystem than `tmp_path`'s."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second filesystem here")
    folder = tempfile.mkdtemp(prefix="zinfer-test-", dir="/dev/shm")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def mounted(tmp_path):
    """mounted(options) -> a fresh tmpfs mounted with those options; skips where that is not allowed."""
    points = []

    def mount(options):
        point = tmp_path / f"mounted{len(points)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True, timeout=30).returncode
        ):
            pytest.skip("mounting a tmpfs is not allowed here")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True, timeout=30)


@pytest.fixture
def start_python():
    """start_python(code) -> a running interpreter, killed at the end of the test if it still runs."""
    running = []

    def start(code):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", LIBRARIES_ONLY + textwrap.dedent(code)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate(timeout=60)
