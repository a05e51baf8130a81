"""The sweep as a picture: GB/s over depth, a line for each backend and block size."""

from __future__ import annotations

from collections.abc import Sequence

from zinfer.aio_bench.measurement import Measurement
from zinfer.aio_bench.table import size_text
from zinfer.errors import OptionError

STYLES = {"io_uring": "-", "libaio": "--", "threads": ":"}
FORMATS = (".png", ".svg", ".pdf")


def require_matplotlib(path: str) -> None:
    """Raises OptionError where `path` cannot become a picture; asked before anything is measured."""
    if not path.endswith(FORMATS):
        raise OptionError(f"--plot {path}: give a name that ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install matplotlib") from error


def draw(measurements: Sequence[Measurement], title: str, path: str) -> None:
    """Write the picture to `path`. Raises OSError."""
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(item.direction for item in measurements))
    figure = Figure(figsize=(6 * len(directions), 4.5), layout="constrained")
    figure.suptitle(title)
    blocks = sorted({item.setting.block_bytes for item in measurements})
    for index, direction in enumerate(directions):
        axes = figure.add_subplot(1, len(directions), index + 1)
        axes.set(title=direction, xlabel="depth (threads: their number)", ylabel="GB/s", xscale="log")
        lines: dict[tuple[str, int], list[Measurement]] = {}
        for item in measurements:
            if item.direction == direction:
                lines.setdefault((item.setting.backend, item.setting.block_bytes), []).append(item)
        for (backend, block), items in lines.items():
            items = sorted(items, key=lambda item: item.setting.depth)
            axes.errorbar(
                [item.setting.depth for item in items],
                [item.rate / 1e9 for item in items],
                yerr=[
                    [(item.rate - item.low) / 1e9 for item in items],
                    [(item.high - item.rate) / 1e9 for item in items],
                ],
                linestyle=STYLES[backend],
                color=f"C{blocks.index(block)}",
                marker="o",
                markersize=3,
                capsize=2,
                label=f"{backend}, {size_text(block)}",
            )
        depths = sorted({item.setting.depth for item in measurements})
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
