"""Write a tool's own copy of a checkpoint, with the Python of the tool's venv; for versus.py only."""

from __future__ import annotations

import argparse
import importlib

parser = argparse.ArgumentParser(prog="python -m benchmarks.tools", description=__doc__)
parser.add_argument("tool")
parser.add_argument("checkpoint")
parser.add_argument("target")
options = parser.parse_args()
importlib.import_module(f"benchmarks.tools.{options.tool}").convert(options.checkpoint, options.target)
