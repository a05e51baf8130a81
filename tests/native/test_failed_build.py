"""Without a compiler zinfer installs all the same, says so, and reads files with portable code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 120.0

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")

READ = """
import ctypes, sys
import zinfer.aio, zinfer.pinned
from zinfer.aio import Engine, File
assert zinfer.aio.__file__.startswith(sys.argv[1]), zinfer.aio.__file__
assert not zinfer.aio.COMPILED and not zinfer.pinned.COMPILED
contents = open(zinfer.aio.__file__, "rb").read()
buffer = ctypes.create_string_buffer(len(contents))
file, engine = File(zinfer.aio.__file__), Engine()
assert engine.read([(file, 0, len(contents), ctypes.addressof(buffer), False)], buffer).wait(20)
assert buffer.raw == contents
"""


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree, without anything that was built."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "zinfer"):
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def run(command, folder, **environment):
    variables = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false", **environment}
    for name in ("ZINFER_PORTABLE", "PYTHONPATH"):
        variables.pop(name, None)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=variables | environment, capture_output=True, text=True,
        timeout=DEADLINE, check=False,
    )  # fmt: skip


def test_a_failed_build_installs_portable_code_that_warns_once(source, tmp_path):
    target = str(tmp_path / "target")
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    installed = run(
        ["-m", "pip", "install", *options, "--target", target, "."], source, ZINFER_REQUIRE_BUILD="0"
    )
    assert installed.returncode == 0, installed.stderr
    assert not list(Path(target).rglob("*.so"))
    used = run(["-c", READ, target], tmp_path, PYTHONPATH=target)
    assert used.returncode == 0, used.stderr
    assert used.stderr.count("compiled modules are not in use") == 1
    assert "No module named 'zinfer" in used.stderr and "install g++" in used.stderr


def test_a_failed_build_says_in_one_line_what_is_lost_and_how_to_mend_it(source):
    built = run(["setup.py", "-q", "build_ext", "--inplace"], source, ZINFER_REQUIRE_BUILD="")
    assert built.returncode == 0, built.stderr
    [line] = [line for line in built.stderr.splitlines() if line.startswith("zinfer: WARNING")]
    for part in ("/bin/false", "io_uring", "page-locking", "install g++", "liburing-dev"):
        assert part in line


def test_a_failed_build_is_an_error_where_the_build_is_required(source):
    built = run(["setup.py", "-q", "build_ext", "--inplace"], source, ZINFER_REQUIRE_BUILD="1")
    assert built.returncode != 0
    assert "/bin/false" in built.stderr and "zinfer: WARNING" not in built.stderr
