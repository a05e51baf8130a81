from __future__ import annotations

import io
import re
import threading

import pytest

from zinfer.cli.progress import Progress, SweepMeter
from zinfer.cli.streamers import TextStreamer
from zinfer.cli.terminal import Terminal

ROWS = 6


class Screen:
    """A terminal of ROWS rows that knows what Terminal sends; both streams write to it."""

    def __init__(self) -> None:
        self.rows, self.row, self.column, self.saved = [""], 0, 0, (0, 0)

    def take(self, text: str) -> None:
        for token in re.findall(r"\x1b\[\w*|\x1b.|[^\x1b]", text.replace("\x1b[2K", "\x1b2")):
            {
                "\r": self._return,
                "\n": self._newline,
                "\x1bD": self._index,
                "\x1b[A": self._up,
                "\x1b[B": self._down,
                "\x1b2": self._erase,
                "\x1b7": self._save,
                "\x1b8": self._restore,
            }.get(token, lambda token=token: self._put(token))()

    def text(self) -> list[str]:
        return [row.rstrip() for row in self.rows]

    def _top(self) -> int:
        return max(0, len(self.rows) - ROWS)

    def _return(self) -> None:
        self.column = 0

    def _index(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    def _newline(self) -> None:
        self.column = 0
        self._index()

    def _up(self) -> None:
        self.row = max(self._top(), self.row - 1)

    def _down(self) -> None:
        self.row = min(self._top() + ROWS - 1, self.row + 1)
        assert self.row < len(self.rows)

    def _erase(self) -> None:
        self.rows[self.row] = ""

    def _save(self) -> None:
        self.saved = (self.row - self._top(), self.column)

    def _restore(self) -> None:
        self.row, self.column = self.saved[0] + self._top(), self.saved[1]

    def _put(self, char: str) -> None:
        assert char >= " ", repr(char)
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + char + row[self.column + 1 :]
        self.column += 1


class Side(io.StringIO):
    """One of the streams onto a screen."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def write(self, text: str) -> int:
        self._screen.take(text)
        return super().write(text)

    def isatty(self) -> bool:
        return True


def test_text_and_status_line_share_a_screen_without_a_scratch():
    screen = Screen()
    terminal = Terminal(Side(screen), Side(screen))
    for number in range(40):
        terminal.status(f"token {number}")
        terminal.write(f"w{number}" + ("\n" if number % 4 == 3 else " "))
        terminal.status(f"token {number} again")
    assert any("token 39 again" in row for row in screen.text())
    terminal.status("")
    written = "".join(f"w{n}" + ("\n" if n % 4 == 3 else " ") for n in range(40))
    assert [row for row in screen.text() if row] == [row.rstrip() for row in written.splitlines()]


def test_a_note_starts_a_row_of_its_own_in_mid_text():
    screen = Screen()
    terminal = Terminal(Side(screen), Side(screen))
    terminal.write("half a wo")
    terminal.status("token 2")
    terminal.note("zinfer: warning: the drive is slow")
    terminal.write("rd")
    terminal.status("")
    assert [row for row in screen.text() if row] == ["half a wo", "zinfer: warning: the drive is slow", "rd"]


def test_a_model_cannot_steer_the_terminal():
    screen = Screen()
    out = Side(screen)
    Terminal(out, Side(screen)).write("a\x1b]0;title\x07b\tc\n".replace("\t", " "))
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()


def test_where_neither_is_a_terminal_the_text_is_left_as_it_is():
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(out, err)
    terminal.status("token 1")
    terminal.write("a\x1bb")
    assert (out.getvalue(), err.getvalue()) == ("a\x1bb", "")


class Source:
    """Stands in for model.zinfer."""

    sweep_bytes = 4_000_000_000
    sweeps = 0
    bytes_read = 0


def test_the_meter_tells_bytes_rate_and_seconds():
    source, now = Source(), [0.0]
    meter = SweepMeter(source, 3, 6_000_000_000, lambda: now[0])
    assert meter.line() == "starting"
    source.sweeps, source.bytes_read, now[0] = 1, 3_000_000_000, 1.0
    assert meter.line() == "token 1 of 3 [##########          ] 3.00 GB of 6.00 GB, 3.00 GB/s"
    source.bytes_read, now[0] = 6_400_000_000, 2.0
    assert meter.token() == "token 1 of 3: 6.40 GB read at 3.20 GB/s, 2.00 s a token"
    source.bytes_read, now[0] = 7_400_000_000, 2.5
    assert meter.line() == "token 2 of 3 [#####               ] 1.00 GB of 4.00 GB, 2.00 GB/s, 2.00 s a token"
    source.bytes_read, now[0] = 8_400_000_000, 3.0
    meter.token()
    source.bytes_read = 9_400_000_000
    now[0] = 3.5
    assert "1.00 GB of 2.00 GB" in meter.line(), "the second sweep tells what later ones read"
    meter.token()
    assert meter.line() == ""


def test_a_model_in_memory_has_no_bytes_to_show():
    source = Source()
    source.sweep_bytes, source.sweeps = 0, 1
    assert SweepMeter(source, 3, 0, lambda: 1.0).line() == "token 1 of 3, all weights in memory"


def test_the_thread_of_progress_ends_with_its_block_even_on_an_error():
    screen = Screen()
    terminal = Terminal(Side(screen), Side(screen))
    source = Source()
    with pytest.raises(RuntimeError), Progress(terminal, SweepMeter(source, 3, 1), shown=True):
        assert "zinfer-progress" in [thread.name for thread in threading.enumerate()]
        raise RuntimeError
    assert "zinfer-progress" not in [thread.name for thread in threading.enumerate()]
    assert not any(screen.text())


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(one for one in ids if one < 256).decode(errors="replace")


class Id:
    def __init__(self, value: int) -> None:
        self.value = value

    def flatten(self):
        return self

    def tolist(self):
        return [self.value]


@pytest.mark.parametrize(
    "data",
    ["plain", "zoë 日本 🙂 end", "🙂", b"\xff\xfe ok \xe6\x97", b"\xe6", b"", "a\n b\n", b"x\xf0\x9f\x99"],
)
def test_text_comes_in_pieces_that_make_the_whole(data):
    ids = list(data.encode() if isinstance(data, str) else data)
    pieces: list[str] = []
    streamer = TextStreamer(Bytes(), pieces.append, lambda: None)
    for one in [1, *ids]:  # the first is the prompt
        streamer.put(Id(one))
    streamer.end()
    assert "".join(pieces) == streamer.text == bytes(ids).decode(errors="replace")


def test_every_ascii_token_is_shown_at_once():
    pieces: list[str] = []
    streamer = TextStreamer(Bytes(), pieces.append, lambda: None)
    for one in b"-half":
        streamer.put(Id(one))
    assert pieces == list("half")
