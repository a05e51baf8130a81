"""`zinfer doctor`: what this machine and this drive offer, and what to do about each shortfall."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

NAME = "doctor"
SUMMARY = "say what was found on this machine, and what to do about each shortfall"
DESCRIPTION = """\
Look at versions, I/O backends, the drive behind PATH (speed measured for a second), page locking, huge
pages, memory and limits. Each finding is ok, a note (works, could be faster) or a problem, with a remedy.
Exits with 1 when there is a problem."""
EPILOG = """\
examples:
  zinfer doctor
  zinfer doctor /mnt/nvme
  zinfer doctor ./llama-demo/model-00001-of-00002.safetensors --json

A writable folder without shards gets a nameless temporary file of 256 MiB, gone when the command ends.
Files and folders with shards are only read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        default=".",
        help="folder or file on the drive in question; default: here",
    )
    parser.add_argument("--json", action="store_true", help="print findings and facts as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Carry out `zinfer doctor`; returns 1 when a finding is a problem, else 0."""
    from zinfer.doctor import PROBLEM, as_text, gather, judge

    facts = gather(arguments.path)
    findings = judge(facts)
    if arguments.json:
        document = {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "facts": dataclasses.asdict(facts),
        }
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write(as_text(findings))
    return 1 if any(finding.level == PROBLEM for finding in findings) else 0
