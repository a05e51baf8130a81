"""The tools that versus.py compares, and the venvs of those that need one.

    python -m benchmarks.peers --folder DIR

makes a venv for each under DIR, or brings it up to date. It compiles for some ten minutes, and needs g++ and
libaio's header (libaio-dev).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.child import ROOT
from benchmarks.report import main_of

TORCH = ("-r", str(ROOT / "constraints.txt"))
TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0")
COMPILE = "from benchmarks.tools import deepspeed; deepspeed.start()"


@dataclass(frozen=True)
class Tool:
    """One tool. `name` is its module in benchmarks/tools, its option in --tools and its venv's folder.

    `installs` are the arguments of one `pip install` after the other, none for a tool that runs in zinfer's own
    Python; `first_use` is Python code that compiles what the tool compiles at first use. `once`: so slow that a
    cell has it in its first round only. `limited`: runs within the cell's limit. `factor`: how many times as long a
    token must take it, in the headline cell, as zinfer.
    """

    name: str
    title: str
    installs: tuple[tuple[str, ...], ...] = ()
    first_use: str | None = None
    converts: bool = False
    once: bool = False
    limited: bool = True
    factor: float | None = None


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("zinfer", "zinfer"),
        Tool(
            "deepspeed",
            "DeepSpeed ZeRO-3 NVMe",
            (
                TORCH,
                ("ninja", "setuptools", "wheel", "packaging", "psutil", *TRANSFORMERS),
                ("--no-build-isolation", "deepspeed==0.19.8"),
            ),
            first_use=COMPILE,
            factor=1.6,
        ),
        Tool(
            "llamacpp",
            "llama.cpp mmap",
            (("llama-cpp-python==0.3.36", "gguf==0.19.0"),),
            converts=True,
            factor=1.8,
        ),
        Tool("accelerate", "accelerate disk offload", factor=2.7),
        Tool("airllm", "AirLLM", (TORCH, ("airllm==4.0.0", *TRANSFORMERS)), converts=True, once=True),
        Tool("memory", "in memory, no limit", limited=False),
    )
}
PEERS = tuple(tool.name for tool in TOOLS.values() if tool.limited and tool.name != "zinfer")


def python_of(tool: Tool, folder: str | None) -> str:
    """The Python that runs `tool`, of its venv under `folder`. Raises BenchmarkError where that is not there."""
    if not tool.installs:
        return sys.executable
    if folder is None:
        raise BenchmarkError("needs --peers-folder")
    python = os.path.join(os.path.abspath(folder), tool.name, "bin", "python")
    if not os.path.exists(python):
        raise BenchmarkError(f"no venv; make it: python -m benchmarks.peers --folder {folder}")
    return python


def set_up(tool: Tool, folder: str) -> None:
    """Make the venv of `tool` under `folder`. Raises BenchmarkError when a step fails."""
    place = Path(folder).absolute() / tool.name
    if not (place / "bin" / "python").exists():
        venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PYTHONPATH": str(ROOT)}
    steps = [[python, "-m", "pip", "install", "--quiet", *arguments] for arguments in tool.installs]
    if tool.first_use:
        steps.append([python, "-c", tool.first_use])
    for step in steps:
        sys.stderr.write(f"{tool.name}: {' '.join(step[1:])}\n")
        if subprocess.run(step, env=environment, cwd=ROOT).returncode != 0:
            raise BenchmarkError(f"{tool.name}: this step failed: {' '.join(step)}")


def main(arguments: Sequence[str]) -> int:
    """Make the venvs."""
    with_venv = [tool.name for tool in TOOLS.values() if tool.installs]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", required=True, help="where the venvs are made (some 5 GB)")
    parser.add_argument("--tools", nargs="+", choices=with_venv, default=with_venv)
    options = parser.parse_args(arguments)
    for name in options.tools:
        set_up(TOOLS[name], options.folder)
    return 0


if __name__ == "__main__":
    main_of(main)
