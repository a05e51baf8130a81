"""The picture: a PNG of the size of a screen, for anything that can be recorded."""

from __future__ import annotations

import builtins
import struct
from dataclasses import replace

import pytest

from tests.timeline.scenes import timeline
from zinfer.errors import OptionError
from zinfer.timeline import picture
from zinfer.timeline.events import COMPUTE, READS, SWEEPS, Span, Timeline, totals


def size_of(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize(
    "drawn",
    [
        timeline(),
        timeline(window=()),
        Timeline("M", (Span(READS, "w", 0.5, 0.5, nbytes=1, kind="load"),)),
        Timeline("M", tuple(Span(SWEEPS, str(n), n / 10, n / 10 + 0.05) for n in range(500))),
        Timeline("M", tuple(Span(COMPUTE, "w", n, n + 0.5, thread=n % 5) for n in range(50))),
        Timeline("M", (Span(READS, "w", 0, 1e9, nbytes=1 << 59, kind="prefetch"),)),
    ],
    ids=["all rows", "no window", "one moment", "many sweeps", "five threads", "thirty years"],
)
def test_it_is_a_png_of_the_size_of_a_screen(drawn, tmp_path):
    pytest.importorskip("matplotlib")
    picture.draw(drawn, tmp_path / "out.png")
    width, height = size_of(tmp_path / "out.png")
    assert (width, height) == (1680, 780)
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_the_title_says_what_ran_and_where_the_time_went():
    drawn = replace(timeline(), dropped=3)
    assert picture.title(drawn, totals(drawn)).splitlines() == [
        "Model: 2 sweeps in 3.00 s, 4.6e-06 GB read (3 older events were dropped)",
        "drive busy 66.7 %, bubbles 1 s, operators waited 1 s",
    ]


def test_without_sweeps_the_share_is_unknown():
    assert "busy unknown" in picture.title(Timeline("M", ()), totals(Timeline("M", ())))


def test_nothing_cannot_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match="empty"):
        picture.draw(Timeline("M", ()), tmp_path / "out.png")


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError("no such module")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match="pip install matplotlib"):
        picture.draw(timeline(), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_any_other_kind_of_picture_is_refused(tmp_path):
    with pytest.raises(OptionError, match="PNG"):
        picture.draw(timeline(), tmp_path / "out.jpg")


@pytest.mark.parametrize("name", ["$\\frac{", "\x1b[2J\nevil", "\ud800", "x" * 10_000])
def test_a_name_from_a_file_neither_steers_a_terminal_nor_is_taken_for_a_formula(name, tmp_path):
    drawn = Timeline(name, (Span(SWEEPS, name, 0, 1), Span(READS, "w", 0, 1, nbytes=1, kind="load")))
    lines = picture.title(drawn, totals(drawn)).splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() and len(line) < 300 for line in lines)
    pytest.importorskip("matplotlib")
    picture.draw(drawn, tmp_path / "out.png")
    assert size_of(tmp_path / "out.png") == (1680, 780)
