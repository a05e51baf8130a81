"""What versus.py prints of its cells, and what zinfer must reach in them. No process is started here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.bench import QUIET_ROUNDS, Run
from benchmarks.cells import Found, difference
from benchmarks.peers import PEERS, TOOLS
from benchmarks.report import Requirement, Spread, table

GB = 1e9
SHARE_BOUND = 0.85
LOAD_BOUND = 1.1
FIGURES: list[tuple[str, Callable[[Run], float | None], float, int]] = [
    ("seconds a token", lambda run: run.seconds_a_token, 1, 2),
    ("load, s", lambda run: run.outcome.load_seconds, 1, 2),
    ("load and first token, s", lambda run: run.first_seconds, 1, 2),
    ("process start to first token, s", lambda run: run.outcome.from_start, 1, 2),
    ("read till first token, GB", lambda run: run.first_read, GB, 2),
    ("read a token, GB", lambda run: run.bytes_a_token, GB, 2),
    ("written, GB", lambda run: run.written, GB, 2),
    ("share of the drive", lambda run: run.share, 1, 2),
    ("peak anonymous, GB", lambda run: run.usage.peak_anonymous, GB, 2),
    ("peak with page cache, GB", lambda run: run.usage.max_usage, GB, 2),
]


def tokens_text(runs: Sequence[Run], reference: Run | None, batch: int) -> str:
    """Whether all `runs` gave the tokens of `reference`; the first that did not tells how."""
    if reference is None or not runs:
        return ""
    texts = [difference(run.outcome.tokens, reference.outcome.tokens, batch) for run in runs]
    return next((text for text in texts if text != "equal"), "equal")


def cell_table(found: Found, tools: Sequence[str], reference: Run | None) -> str:
    """One row a tool: medians and ranges over the rounds that count, and why it failed where it did."""
    header = ["tool", "zinfer is faster by", *(name for name, *_ in FIGURES), "tokens", "disturbed"]
    rows = []
    for tool in tools:
        title = TOOLS[tool].title
        counted = found.of(tool) if TOOLS[tool].limited else [reference] if reference else []
        if not counted:
            rows.append([title, found.failed.get(tool, "not run"), *[""] * (len(header) - 2)])
            continue
        every = [*found.runs[tool].values()] if TOOLS[tool].limited else counted
        ratios = found.ratios(tool) if tool in PEERS else []
        figures = []
        for _, figure, scale, digits in FIGURES:
            values = [value for run in counted if (value := figure(run)) is not None]
            figures.append(Spread.of(values).text(scale, digits) if values else "")
        rows.append(
            [
                title,
                _beside(ratios, found.failed.get(tool)),
                *figures,
                tokens_text(every, reference, found.cell.batch),
                f"{sum(run.disturbed for run in every)} of {len(every)}",
            ]
        )
    return table(header, rows)


def _beside(ratios: Sequence[float], failed: str | None) -> str:
    """By how much zinfer is faster than a tool that ran, and why that tool did not go on."""
    texts = [f"{Spread.of(ratios).text()} x"] if ratios else []
    return "; ".join([*texts, *([f"failed {failed}"] if failed else [])])


def summary_table(cells: Sequence[Found], tools: Sequence[str], figure: str, digits: int) -> str:
    """One row a cell, one column a limited tool: medians of an attribute of Run, or a dash; who failed later."""
    limited = [tool for tool in tools if TOOLS[tool].limited]
    rows = []
    for found in cells:
        values = []
        for tool in limited:
            value = found.median(tool, figure)
            later = " (then failed)" if tool in found.failed else ""
            values.append("-" if value is None else f"{value:.{digits}f}{later}")
        rows.append([found.title, *values])
    return table(["", *(TOOLS[tool].title for tool in limited)], rows)


def rounds_table(found: Found, tools: Sequence[str]) -> str:
    """One row a round: seconds a token of each limited tool."""
    limited = [tool for tool in tools if found.runs.get(tool)]
    numbers = sorted({number for tool in limited for number in found.runs[tool]})
    rows = []
    for number in numbers:
        runs = [found.runs[tool].get(number) for tool in limited]
        rows.append(
            [
                str(number + 1),
                *(
                    f"{run.seconds_a_token:.3f}{' (disturbed)' if run.disturbed else ''}" if run else "-"
                    for run in runs
                ),
            ]
        )
    return table(["round", *(TOOLS[tool].title for tool in limited)], rows)


def requirements(
    cells: Sequence[Found],
    headline: Found | None,
    tools: Sequence[str],
    references: dict[int, Run],
    model_bytes: int,
) -> list[Requirement]:
    """What zinfer promises, as measured: over all cells, and with figures in the headline cell.

    A peer that ran nowhere is a comparison that was not made; a ratio that there is not counts as 0.
    """
    peers = [tool for tool in tools if tool in PEERS]
    mine = [run for found in cells for run in found.runs.get("zinfer", {}).values()]
    slower = sum(len(found.behind("seconds_a_token", peers)) for found in cells)
    later = sum(len(found.behind("first_seconds", peers)) for found in cells)
    wrote = max([run.outcome.report["bytes_written"] for run in mine if run.outcome.report], default=0)
    required = [
        Requirement(
            "cells in which zinfer ran", sum(found.ran("zinfer") for found in cells), len(cells), True
        ),
        Requirement(
            "peers that ran in a cell at least",
            sum(any(found.of(peer) for found in cells) for peer in peers),
            len(peers),
            True,
        ),
        Requirement("peers as fast a token or faster, over all cells", slower, 0, False),
        Requirement("peers whose first token came sooner, over all cells", later, 0, False),
        Requirement("bytes zinfer wrote", wrote, 0, False),
    ]
    if "memory" in tools:
        same = sum(
            tokens_text([*found.runs.get("zinfer", {}).values()], references.get(found.cell.batch), 1)
            == "equal"
            for found in cells
        )
        required.append(Requirement("cells in which zinfer's tokens are memory's", same, len(cells), True))
    if headline is None:
        return required
    at = f"at {headline.cell.name}"
    for peer in peers:
        if (factor := TOOLS[peer].factor) is not None:
            ratios = headline.ratios(peer) if headline.ran("zinfer") else []
            name = f"seconds a token {at}, {TOOLS[peer].title} / zinfer"
            required.append(Requirement(name, Spread.of(ratios).median if ratios else 0, factor, True))
    if not headline.of("zinfer"):
        return required
    counted = headline.of("zinfer")
    rounds = len(headline.runs["zinfer"])
    quiet = sum(not run.disturbed for run in headline.runs["zinfer"].values())
    required += [
        Requirement(
            f"share of the drive while decoding {at}",
            Spread.of([run.share for run in counted]).median,
            SHARE_BOUND,
            True,
        ),
        Requirement(
            f"bytes read till the first token {at} / model bytes",
            Spread.of([run.first_read / model_bytes for run in counted]).high,
            LOAD_BOUND,
            False,
        ),
        Requirement(f"undisturbed runs of zinfer {at}", quiet, min(QUIET_ROUNDS, rounds), True),
    ]
    return required
