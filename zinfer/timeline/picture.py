"""A timeline as a picture that one reads at a glance. Needs matplotlib, from the extra `plot`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zinfer.errors import OptionError
from zinfer.timeline.events import (
    COMPUTE,
    COPIES,
    READS,
    SWEEPS,
    WAITS,
    Interval,
    Span,
    Timeline,
    Totals,
    rates,
    totals,
    union,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = (READS, COPIES, COMPUTE, WAITS)  # from the top down
COLOURS = {COPIES: "#8c6bb1", COMPUTE: "#41ab5d", WAITS: "#d7301f"}
READ_COLOURS = {"prefetch": "#2b8cbe", "demand": "#fe9929", "rows": "#f768a1", "load": "#969696"}
INCHES, DPI = (14.0, 6.5), 120
BINS = 400  # of the rate's line
PIXEL = 1 / 3000  # of the time axis: gaps shorter than that share of it cannot be seen
MOST_NUMBERED = 60  # sweeps: more numbers would overlap
HEIGHT = 0.8  # of a row
LONGEST_NAME = 120  # characters of a name in the picture or its title


def require_matplotlib(path: str) -> None:
    """Raises OptionError where `path` cannot become a picture."""
    if not path.endswith(".png"):
        raise OptionError(f"{path}: the picture is a PNG; give a name that ends in .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("the picture needs matplotlib: pip install matplotlib") from error


def draw(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write the picture of `timeline` to `path`, a PNG. Raises OptionError (see require_matplotlib) and OSError."""
    require_matplotlib(os.fspath(path))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not timeline.spans:
        raise OptionError("there is nothing to draw: the timeline is empty")
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title(timeline, totals(timeline)), fontsize=11, parse_math=False)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    start = min(span.start for span in timeline.spans)
    end = max(max(span.end for span in timeline.spans), start + 1e-9)
    _rate(upper, timeline, start, end)
    _rows(lower, timeline, (end - start) * PIXEL)
    _sweeps(upper, lower, timeline, (end - start) / MOST_NUMBERED)
    lower.set_xlim(start, end)
    lower.set_xlabel("seconds since zinfer.run")
    if timeline.row(READS):
        handles, labels = lower.get_legend_handles_labels()
        figure.legend(
            handles,
            [f"read: {label}" for label in labels],
            loc="outside lower center",
            ncols=4,
            fontsize="small",
        )
    figure.savefig(path, dpi=DPI, format="png")


def shown(name: str) -> str:
    """`name`, which a file may bring, in a line: without what would steer a terminal, and of bounded length."""
    clean = "".join(char if char.isprintable() else "\ufffd" for char in name[:LONGEST_NAME])
    return clean if len(name) <= LONGEST_NAME else f"{clean}..."


def title(timeline: Timeline, sums: Totals) -> str:
    """Two lines: what ran, and what the drive and the operators made of the time."""
    plural = "" if sums.sweeps == 1 else "s"
    lines = [
        f"{shown(timeline.model)}: {sums.sweeps} sweep{plural} in {sums.seconds:.2f} s, "
        f"{sums.bytes_read / 1e9:.3g} GB read"
        + (f" ({timeline.dropped} older events were dropped)" if timeline.dropped else "")
    ]
    share = f"{100 * sums.busy_seconds / sums.seconds:.1f} %" if sums.seconds > 0 else "unknown"
    lines.append(
        f"drive busy {share}, bubbles {sums.bubble_seconds:.3g} s, operators waited {sums.wait_seconds:.3g} s"
    )
    return "\n".join(lines)


def _rate(axes: Axes, timeline: Timeline, start: float, end: float) -> None:
    """GB/s of the drive as a line, and the window's fill behind it."""
    width = (end - start) / BINS
    values = [rate / 1e9 for rate in rates(timeline.row(READS), start, end, BINS)]
    axes.step(
        [start + number * width for number in range(BINS)], values, where="post", color="#08519c", lw=1.2
    )
    axes.set_ylabel("drive, GB/s", color="#08519c")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    if timeline.window:
        other = axes.twinx()
        times, used = zip(*timeline.window, strict=True)
        unit, name = (1e9, "GB") if max(used) >= 1e8 else (1e6, "MB")
        other.fill_between(
            times, [count / unit for count in used], step="post", color="#bdbdbd", alpha=0.4, lw=0
        )
        other.set_ylabel(f"window in use, {name}", color="#636363")
        other.set_ylim(bottom=0)
        axes.set_zorder(other.get_zorder() + 1)  # the line before the fill
        axes.patch.set_visible(False)


def _rows(axes: Axes, timeline: Timeline, gap: float) -> None:
    for number, row in enumerate(ROWS):
        spans, bottom = timeline.row(row), -number - HEIGHT / 2
        if not spans:
            axes.text(
                0.5,
                -number,
                "none",
                transform=axes.get_yaxis_transform(),
                ha="center",
                va="center",
                color="0.6",
            )
        elif row == READS:
            kinds = [kind for kind in READ_COLOURS if any(span.kind == kind for span in spans)]
            for place, kind in enumerate(kinds):
                chosen = [span for span in spans if span.kind == kind]
                _band(axes, chosen, _slot(bottom, place, len(kinds)), READ_COLOURS[kind], gap, label=kind)
        else:
            threads = sorted({span.thread for span in spans})
            for place, thread in enumerate(threads):
                chosen = [span for span in spans if span.thread == thread]
                _band(axes, chosen, _slot(bottom, place, len(threads)), COLOURS[row], gap)
    axes.set_yticks([-number for number in range(len(ROWS))], ROWS)
    axes.set_ylim(-len(ROWS) + 0.5, 0.5)


def _slot(bottom: float, place: int, count: int) -> tuple[float, float]:
    """(bottom, height) of the strip `place` of `count` in a row, the first on top."""
    height = HEIGHT / count
    return bottom + HEIGHT - (place + 1) * height, height


def _band(
    axes: Axes, spans: list[Span], strip: tuple[float, float], colour: str, gap: float, **options: Any
) -> None:
    drawn: list[Interval] = union(((span.start, span.end) for span in spans), gap)
    axes.broken_barh(
        [(start, end - start) for start, end in drawn],
        strip,
        color=colour,
        lw=0.3,
        edgecolor=colour,
        **options,
    )


def _sweeps(upper: Axes, lower: Axes, timeline: Timeline, shortest: float) -> None:
    """A line where a sweep begins, and its number, at least `shortest` seconds apart."""
    numbered = -shortest
    for span in timeline.row(SWEEPS):
        if span.start - numbered < shortest:
            continue
        numbered = span.start
        for axes in (upper, lower):
            axes.axvline(span.start, color="0.3", lw=0.7, ls="--", alpha=0.7)
        place: dict[str, Any] = {"transform": upper.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        upper.text(span.start, 1.01, shown(span.name), fontsize="x-small", parse_math=False, **place)
