"""`zinfer timeline`: what a recorded run did with its time, as text and as a picture."""

from __future__ import annotations

import argparse
import io
import sys

from zinfer.cli.terminal import check_writable

NAME = "timeline"
SUMMARY = "show where the time of a recorded run went, as a picture"
DESCRIPTION = """\
Add up a trace that `zinfer run --timeline FILE` or model.zinfer.timeline(FILE) wrote, and draw it: the drive's rate,
reads from the drive, copies to a device, compute and waits over time. The same file opens in https://ui.perfetto.dev."""
EPILOG = """\
examples:
  zinfer run ./llama-demo --prompt "Hello" --max-memory cpu=3GiB --timeline out.json
  zinfer timeline out.json --png out.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument("file", metavar="FILE", help="the trace")
    parser.add_argument("--png", metavar="FILE", help="draw it there (needs matplotlib)")


def main(arguments: argparse.Namespace) -> int:
    """Carry out `zinfer timeline`; returns 0. Raises OptionError and OSError."""
    from zinfer.timeline import chrome, picture
    from zinfer.timeline.events import totals

    if arguments.png is not None:
        picture.require_matplotlib(arguments.png)
        check_writable("--png", arguments.png)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that stdout lacks must not end the command
    timeline = chrome.read(arguments.file)
    sys.stdout.write(picture.title(timeline, totals(timeline)) + "\n")
    if arguments.png is not None:
        picture.draw(timeline, arguments.png)
    return 0
