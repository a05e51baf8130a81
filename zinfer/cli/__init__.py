"""The `zinfer` command: run, synth, doctor. Each command is a module here; `entry` ties them together."""

from __future__ import annotations

from zinfer.cli.entry import main

__all__ = ["main"]
