"""Results as text."""

from __future__ import annotations

from collections.abc import Sequence

from zinfer.aio_bench.fio import Comparison
from zinfer.aio_bench.measurement import Measurement

MEASURED = ("backend", "block", "depth", "GB/s", "(lowest-highest)", "CPU s/GB", "p50 ms", "p99 ms", "")
COMPARED = ("backend", "block", "depth", "GB/s", "fio GB/s", "ratio", "(lowest-highest)", "CPU s/GB", "fio's")


def measured_table(measurements: Sequence[Measurement], best: Measurement) -> str:
    """One line a setting, the fastest first; `best` is marked. For "threads", depth is the number of threads."""
    rows = [
        (
            item.setting.backend,
            size_text(item.setting.block_bytes),
            str(item.setting.depth),
            f"{item.rate / 1e9:.2f}",
            f"({item.low / 1e9:.2f}-{item.high / 1e9:.2f})",
            f"{item.cpu_per_gb:.4f}",
            f"{item.p50 * 1e3:.2f}",
            f"{item.p99 * 1e3:.2f}",
            "<- best" if item is best else "",
        )
        for item in sorted(measurements, key=lambda item: -item.rate)
    ]
    return columns([MEASURED, *rows])


def compared_table(comparisons: Sequence[Comparison]) -> str:
    """One line a setting against fio."""
    rows = [
        (
            item.setting.backend,
            size_text(item.setting.block_bytes),
            str(item.setting.depth),
            f"{item.ours / 1e9:.2f}",
            f"{item.fio / 1e9:.2f}",
            f"{item.ratio:.3f}",
            f"({min(item.ratios):.3f}-{max(item.ratios):.3f})",
            f"{item.our_cpu:.4f}",
            f"{item.fio_cpu:.4f}",
        )
        for item in comparisons
    ]
    return columns([COMPARED, *rows])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first one to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines) + "\n"


def size_text(nbytes: int) -> str:
    """`256 KiB`, `4 MiB`; bytes where it is no whole number of KiB."""
    for unit, text in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {text}"
    return f"{nbytes} B"
