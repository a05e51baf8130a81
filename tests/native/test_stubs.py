"""The stubs of the native modules say what is there: every name, parameter and default, and no more."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each line: what the checker sees, and why it is no fault of the stub.
ALLOWED = r"""
zinfer\.(aio|pinned)\._native\.(Engine|File|Pool|Region|Request|Timing)  # the metaclass is pybind11's own
zinfer\.aio\._native\.Request\.__init__  # made by Engine only: pybind11's placeholder raises TypeError
zinfer\.aio\._native\.Timing\.__init__  # made by Request only: the same
zinfer\.pinned\._native\.Region\.__init__  # made by Pool only: the same
zinfer\.pinned\._native\.Region\.__buffer__  # the buffer protocol, which has that name from Python 3.12 on
zinfer\.aio\._native\.Stats  # the type of a dict; not an object of the module
"""


def test_the_stubs_agree_with_the_modules(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "allowed").write_text(ALLOWED)
    # Nothing but the stubs is looked at: what they belong to imports torch, which takes a minute.
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\n")
    command = [
        sys.executable,
        "-m",
        "mypy.stubtest",
        "zinfer.aio._native",
        "zinfer.pinned._native",
        "--concise",
    ]
    command += ["--allowlist", str(tmp_path / "allowed"), "--ignore-unused-allowlist"]
    command += ["--mypy-config-file", str(tmp_path / "mypy.ini")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
