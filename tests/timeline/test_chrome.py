"""Trace files: what is written is a Chrome trace and comes back; what is no such file is refused."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.timeline.scenes import timeline
from zinfer.errors import OptionError
from zinfer.timeline import chrome
from zinfer.timeline.events import READS, ROWS, Span, Timeline


@pytest.fixture
def path(tmp_path):
    chrome.write(timeline(), tmp_path / "out.json")
    return tmp_path / "out.json"


def test_what_is_written_comes_back(path):
    found = chrome.read(path)
    assert sorted(found.spans, key=repr) == sorted(timeline().spans, key=repr)
    assert found.window == timeline().window
    assert (found.model, found.dropped) == ("Model", 0)


def test_times_come_back_to_the_nanosecond(tmp_path):
    span = Span(READS, "w", 12345.123456789, 12345.123456999, nbytes=1, kind="demand")
    chrome.write(Timeline("M", (span,)), tmp_path / "out.json")
    (found,) = chrome.read(tmp_path / "out.json").spans
    assert (found.start, found.end) == pytest.approx((span.start, span.end), abs=2e-9)


def test_it_is_what_chrome_and_perfetto_open(path):
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    for event in events:
        assert {"ph", "ts", "pid", "tid", "name"} <= event.keys()
        assert event["ph"] in "XMC"
        assert event["ts"] >= 0
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(timeline().spans)
    assert all(event["dur"] >= 0 for event in spans)
    rows = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert rows == dict(enumerate(ROWS))
    read = next(event for event in spans if event["name"] == "b" and rows[event["pid"]] == READS)
    assert (read["ts"], read["dur"], read["args"]) == (1.5e6, 1e6, {"bytes": 3000, "kind": "prefetch"})
    assert {event["name"] for event in events if event["ph"] == "C"} == {"window", "drive"}


def test_spans_on_one_line_of_the_viewer_do_not_overlap(path):
    lines = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            lines[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len([key for key in lines if key[0] == ROWS.index(READS)]) == 2, "two reads overlap: two lanes"
    for spans in lines.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_names_of_any_kind_survive(tmp_path):
    names = ['a"b', "c\\d", "\n", "é\ud800", "</script>"]
    chrome.write(
        Timeline("M", tuple(Span(READS, name, 0, 1, nbytes=1, kind="rows") for name in names)), tmp_path / "o"
    )
    assert sorted(span.name for span in chrome.read(tmp_path / "o").spans) == sorted(names)


def test_an_empty_timeline_is_a_file_too(tmp_path):
    chrome.write(Timeline("M", ()), tmp_path / "out.json")
    assert chrome.read(tmp_path / "out.json") == Timeline("M", ())


def test_a_file_that_is_missing_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        chrome.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"not json", b"[]", b"null", b"7", b"{}", b'{"traceEvents": []}', b"[" * 100_000,
     b'{"otherData": [], "traceEvents": []}', b'{"otherData": {"format": "another"}, "traceEvents": []}'],
)  # fmt: skip
def test_a_file_that_is_no_timeline_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(OptionError, match=r"x\.json: .*zinfer run --timeline"):
        chrome.read(tmp_path / "x.json")


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off_is_refused(share, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "out.json"
    chrome.write(timeline(), path)
    content = path.read_bytes()
    path.write_bytes(content[: min(int(share * len(content)), len(content) - 3)])
    with pytest.raises(OptionError, match="cut off"):
        chrome.read(path)


def _first_span(document):
    return next(event for event in document["traceEvents"] if event["ph"] == "X")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ts", -1), ("ts", "1"), ("ts", None), ("ts", float("nan")), ("ts", float("inf")), ("ts", 1e300), ("ts", True),
        ("dur", -5), ("dur", float("-inf")), ("pid", 99), ("pid", -1), ("pid", "x"), ("tid", -1), ("tid", 1.5),
        ("name", 7), ("name", None),
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused(field, value, path):
    document = json.loads(path.read_text())
    _first_span(document)[field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(OptionError, match=r"event \d+ is damaged"):
        chrome.read(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        None,
        {"bytes": -1, "kind": "demand"},
        {"bytes": 1.5, "kind": "demand"},
        {"bytes": 1 << 61, "kind": "demand"},
        {"bytes": 1, "kind": "stolen"},
    ],
)
def test_reads_without_sensible_bytes_are_refused(arguments, path):
    document = json.loads(path.read_text())
    read = next(e for e in document["traceEvents"] if e["ph"] == "X" and e["pid"] == ROWS.index(READS))
    read["args"] = arguments
    path.write_text(json.dumps(document))
    with pytest.raises(OptionError, match=r"event \d+ is damaged"):
        chrome.read(path)


@pytest.mark.parametrize("events", [None, {}, "x", [7], [None], [{}], [{"ph": "X"}], [[]]])
def test_events_that_are_none_are_refused(events, path):
    document = json.loads(path.read_text())
    document["traceEvents"] = events
    path.write_text(json.dumps(document))
    with pytest.raises(OptionError, match=r"out\.json"):
        chrome.read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2),
        ("schema", None),
        ("schema", "x" * 10_000),
        ("model", ["M"]),
        ("dropped", -1),
        ("dropped", "x"),
    ],
)
def test_a_damaged_heading_is_refused(field, value, path):
    document = json.loads(path.read_text())
    document["otherData"][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(OptionError, match=r"out\.json") as refused:
        chrome.read(path)
    assert len(str(refused.value)) < 1000


def test_events_of_others_in_the_file_are_passed_over(path):
    document = json.loads(path.read_text())
    document["traceEvents"].append({"ph": "i", "name": "note", "ts": 5, "pid": 77, "tid": 0})
    path.write_text(json.dumps(document))
    assert len(chrome.read(path).spans) == len(timeline().spans)


def test_dropped_events_are_told(tmp_path):
    chrome.write(replace(timeline(), dropped=12), tmp_path / "out.json")
    assert chrome.read(tmp_path / "out.json").dropped == 12
