"""The parser, the choice of command, and what errors look like and exit with.

Exit status: 0 done; 1 an error, or a problem that doctor found; 2 wrong options; 130 Ctrl-C; 141 the
reader of stdout went away.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from zinfer._version import __version__
from zinfer.cli import aio_bench, doctor, plan, run, synth, timeline
from zinfer.errors import OptionError, ZinferError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
READER_GONE = 141  # 128 + SIGPIPE

EPILOG = """\
examples:
  zinfer synth llama-demo ./llama-demo
  zinfer run ./llama-demo --prompt "Once upon a time" --max-memory cpu=3GiB
  zinfer timeline out.json --png out.png
  zinfer plan llama-3.1-70b --hardware rtx4090 --batch 8
  zinfer doctor /mnt/nvme

`zinfer COMMAND --help` explains one command."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are OptionErrors, so that they look like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises OptionError."""
        raise OptionError(f"{message}; see `{self.prog} --help`")


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="log details, show the traceback of an error",
    )
    return common


def build_aio_bench_parser() -> argparse.ArgumentParser:
    """The parser of `aio_bench`."""
    parser: argparse.ArgumentParser = Parser(
        prog=aio_bench.NAME,
        description=aio_bench.DESCRIPTION,
        epilog=aio_bench.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common()],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zinfer {__version__}")
    aio_bench.add_arguments(parser)
    parser.set_defaults(function=aio_bench.main)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each command sets `function(arguments) -> exit status`."""
    common = _common()
    parser: argparse.ArgumentParser = Parser(
        prog="zinfer",
        description="Run Hugging Face models far larger than memory: weights stream from NVMe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zinfer {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in (run, plan, synth, doctor, timeline):
        sub = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.set_defaults(function=command.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out `zinfer` with `argv` (default: the process's own arguments); returns the exit status."""
    return carry_out("zinfer", build_parser, argv)


def aio_bench_main(argv: Sequence[str] | None = None) -> int:
    """The same for the command `aio_bench`."""
    return carry_out("aio_bench", build_aio_bench_parser, argv)


def carry_out(
    program: str, build: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None = None
) -> int:
    """Parse `argv`, call the `function` that it chooses, and turn what that raises into an exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        parsed = build().parse_args(arguments)
        status: int = parsed.function(parsed)
        sys.stdout.flush()
        return status
    except SystemExit as ending:  # argparse, after --help and --version
        return ending.code if isinstance(ending.code, int) else 0
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return READER_GONE
    except (ZinferError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except Exception as error:
        # The outermost frame of a command: what gets here is a bug, and says so.
        if debug:
            traceback.print_exc()
        print(
            f"{program}: error: unexpected {type(error).__name__}: {error}; this is a bug in zinfer or in the "
            "model's code: run again with --debug and report the traceback",
            file=sys.stderr,
        )
        return 1


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain too."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
