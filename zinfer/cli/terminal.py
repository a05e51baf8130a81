"""stdout for text, stderr for a status line and notes, and one lock so that they never mix."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from zinfer.errors import OptionError

SAVE, RESTORE, ERASE, DOWN, UP = "\x1b7", "\x1b8", "\r\x1b[2K", "\x1b[B", "\x1b[A"
INDEX = "\x1bD"  # one row down in the same column, scrolling at the bottom of the screen
NARROWEST = 20  # columns; a terminal that claims fewer is taken at this width


class Terminal:
    """Where a command writes. Any thread may call any method.

    The status line exists only while stderr is a terminal (`live`). Where stdout is one too, the line
    lives in the row below the text, so that text that does not end in a newline is never overwritten:

        Once upon a ti_                <- text, cursor
        token 4 of 20, 1.2 of ...      <- status line; erased before text is written, drawn again after
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self.live = self._err.isatty()
        self._shared = self.live and self._out.isatty()
        self._line = ""
        self._mid_row = False  # whether the text ended without a newline
        self._lock = threading.RLock()

    def write(self, text: str) -> None:
        """Write `text` to stdout now; on a terminal, control characters but newline and tab are replaced."""
        with self._lock:
            line = self._erase()
            self._out.write(printable(text) if self._out.isatty() else text)
            self._out.flush()
            self._mid_row = not text.endswith("\n") if text else self._mid_row
            self._draw(line)

    def note(self, text: str) -> None:
        """Write a line to stderr, above the status line."""
        with self._lock:
            line = self._erase()
            self._err.write(f"\n{text}\n" if self._shared and self._mid_row else f"{text}\n")
            self._err.flush()
            self._mid_row = False
            self._draw(line)

    def status(self, line: str) -> None:
        """Show `line`, cut to the terminal's width, as the status line; "" removes it. Only where `live`."""
        with self._lock:
            if line:
                self._draw(line)
            else:
                self._erase()

    def _draw(self, line: str) -> None:
        if not self.live or not line:
            return
        self._line = line
        shown = line[: self._columns() - 1]
        if self._shared:
            self._err.write(f"{INDEX}{UP}{SAVE}{DOWN}{ERASE}{shown}{RESTORE}")
        else:
            self._err.write(f"{ERASE}{shown}")
        self._err.flush()

    def _erase(self) -> str:
        """Remove the status line; returns what it said."""
        line, self._line = self._line, ""
        if line:
            self._err.write(f"{SAVE}{DOWN}{ERASE}{RESTORE}" if self._shared else ERASE)
            self._err.flush()
        return line

    def _columns(self) -> int:
        try:
            return max(NARROWEST, os.get_terminal_size(self._err.fileno()).columns)
        except (OSError, ValueError):
            return 80


class LogToTerminal(logging.Handler):
    """Log records as notes: `zinfer: warning: ...`."""

    def __init__(self, terminal: Terminal, level: int) -> None:
        super().__init__(level)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self._terminal.note(f"zinfer: {record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def logging_to(terminal: Terminal, level: int) -> Iterator[None]:
    """What zinfer logs from `level` on stands on `terminal` meanwhile."""
    logger = logging.getLogger("zinfer")
    handler = LogToTerminal(terminal, level)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def check_writable(option: str, path: str) -> None:
    """Raises OptionError unless a file can be written at `path`, which `option` names."""
    parent = os.path.dirname(path) or "."
    taken = os.path.exists(path) and not (os.path.isfile(path) and os.access(path, os.W_OK))
    if not path or taken or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise OptionError(f"{option} {path}: not a file that can be written; name one in a writable folder")


def printable(text: str) -> str:
    """`text` without what would steer the terminal: a model's output is not to be trusted."""
    return "".join(
        "\ufffd" if (char < " " and char not in "\n\t") or "\x7f" <= char < "\xa0" else char for char in text
    )
