"""Trace files: what chrome://tracing and ui.perfetto.dev open, and zinfer reads back.

The format is Google's "Trace Event Format" (JSON object form). Each row is a process: 0 sweeps, 1 nvme->host,
2 host->device, 3 compute, 4 wait. Spans are complete events ("X"); reads overlap, so each gets the lowest lane (`tid`)
that is free, while elsewhere `tid` is the thread. `args` holds bytes and kind. Counters ("C"): bytes of the window in
use, and the drive's GB/s. `otherData` names the format, the model and the number of events that were dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from zinfer.errors import OptionError
from zinfer.timeline.events import COPIES, KINDS, READS, ROWS, Span, Timeline, lanes, rates

FORMAT = "zinfer timeline"
SCHEMA = 1
LONGEST = 10.0**10  # seconds: a time beyond is no time
MOST_BYTES = 1 << 60
RATE_BINS = 500
WINDOW, RATE = "window", "drive"  # the counters


def write(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write `timeline` to `path`, in place of what is there. Raises OSError."""
    events = ",\n".join(json.dumps(event) for event in _events(timeline))
    other = {"format": FORMAT, "schema": SCHEMA, "model": timeline.model, "dropped": timeline.dropped}
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(other)}, "traceEvents": [\n{events}\n]}}\n'
        )


def read(path: str | os.PathLike[str]) -> Timeline:
    """The timeline in a file that write() wrote. Raises OSError, and OptionError for any other file."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"it is no JSON, or was cut off ({error})") from error
    other = document.get("otherData") if isinstance(document, dict) else None
    if not isinstance(other, dict) or other.get("format") != FORMAT:
        raise _refusal(path, "it is no timeline of zinfer's")
    if other.get("schema") != SCHEMA:
        raise _refusal(path, f"its schema is {_brief(other.get('schema'))}, and this version reads {SCHEMA}")
    events = document.get("traceEvents")
    if not isinstance(events, list):
        raise _refusal(path, "it holds no list of events")
    spans, window = [], []
    for number, event in enumerate(events):
        try:
            if (span := _span(event)) is not None:
                spans.append(span)
            elif event["ph"] == "C" and event["name"] == WINDOW:
                window.append((_seconds(event["ts"]), _count(event["args"]["bytes"])))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _refusal(
                path, f"its event {number} is damaged ({type(error).__name__}: {error})"
            ) from error
    try:
        if not isinstance(other["model"], str):
            raise ValueError(f"model {_brief(other['model'])}")
        return Timeline(other["model"], tuple(spans), tuple(window), _count(other["dropped"]))
    except (KeyError, ValueError) as error:
        raise _refusal(path, f"its heading is damaged ({type(error).__name__}: {error})") from error


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for pid, row in enumerate(ROWS):
        spans = timeline.row(row)
        yield _named("process_name", pid, 0, row)
        yield {
            "ph": "M",
            "name": "process_sort_index",
            "pid": pid,
            "tid": 0,
            "ts": 0,
            "args": {"sort_index": pid},
        }
        moved = row in (READS, COPIES)
        # In whole nanoseconds, so that what does not overlap here does not in the file.
        times = [(round(span.start * 1e9), round(span.end * 1e9)) for span in spans]
        rows = lanes(times) if moved else [span.thread for span in spans]
        for tid in sorted(set(rows)):
            yield _named("thread_name", pid, tid, f"{'lane' if moved else 'thread'} {tid}")
        for span, (start, end), tid in zip(spans, times, rows, strict=True):
            event = {"ph": "X", "name": span.name, "cat": span.kind or row, "pid": pid, "tid": tid}
            event |= {"ts": start / 1e3, "dur": (end - start) / 1e3}
            yield event | ({"args": {"bytes": span.nbytes, "kind": span.kind}} if moved else {})
    yield from _counters(timeline)


def _counters(timeline: Timeline) -> Iterator[dict[str, Any]]:
    pid = ROWS.index(READS)
    for at, used in timeline.window:
        yield {
            "ph": "C",
            "name": WINDOW,
            "pid": pid,
            "tid": 0,
            "ts": round(at * 1e9) / 1e3,
            "args": {"bytes": used},
        }
    reads = timeline.row(READS)
    if reads:
        start, end = reads[0].start, max(span.end for span in reads)
        for number, rate in enumerate(rates(reads, start, end, RATE_BINS)):
            at = round((start + (end - start) * number / RATE_BINS) * 1e9) / 1e3
            yield {
                "ph": "C",
                "name": RATE,
                "pid": pid,
                "tid": 0,
                "ts": at,
                "args": {"GB/s": round(rate / 1e9, 4)},
            }


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _span(event: Any) -> Span | None:
    """The span of a complete event, None for any other. Raises KeyError, TypeError, ValueError, IndexError."""
    if event["ph"] != "X":
        return None
    row = ROWS[_count(event["pid"])]
    start, length, name = _seconds(event["ts"]), _seconds(event["dur"]), event["name"]
    if not isinstance(name, str):
        raise ValueError(f"name {_brief(name)}")
    if row not in (READS, COPIES):
        return Span(row, name, start, start + length, thread=_count(event["tid"]))
    nbytes, kind = _count(event["args"]["bytes"]), event["args"]["kind"]
    if kind not in (KINDS if row == READS else ("",)):
        raise ValueError(f"kind {_brief(kind)}")
    return Span(row, name, start, start + length, nbytes=nbytes, kind=kind)


def _seconds(microseconds: Any) -> float:
    if type(microseconds) not in (int, float) or not 0 <= microseconds <= LONGEST * 1e6:
        raise ValueError(f"time {_brief(microseconds)}")
    return float(microseconds) / 1e6


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number <= MOST_BYTES:
        raise ValueError(f"number {_brief(number)}")
    return number


def _brief(value: Any) -> str:
    """What stands where a number or a name should: a file may hold anything, of any length."""
    return (
        repr(value)[:80] if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    )


def _refusal(path: str | os.PathLike[str], what: str) -> OptionError:
    return OptionError(
        f"{os.fspath(path)}: {what}; give a file that model.zinfer.timeline() or `zinfer run --timeline` wrote"
    )
