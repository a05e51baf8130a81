from __future__ import annotations

import json

import pytest

from tests.timeline.scenes import timeline
from zinfer.timeline import chrome
from zinfer.timeline.events import READS, SWEEPS

BUDGET = "cpu=200KB"


@pytest.fixture
def recorded(llama, command, tmp_path) -> str:
    """The trace of three tokens."""
    path = str(tmp_path / "out.json")
    arguments = ("--ids", "1,2,3", "--max-new-tokens", "3", "--max-memory", BUDGET, "--timeline", path)
    assert command("run", llama, *arguments)[0] == 0
    return path


def test_run_writes_a_trace(recorded):
    found = chrome.read(recorded)
    assert found.model == "LlamaForCausalLM"
    assert len(found.row(SWEEPS)) == 3
    assert {"demand", "prefetch"} <= {span.kind for span in found.row(READS)}


def test_timeline_adds_it_up(recorded, command):
    status, out, err = command("timeline", recorded)
    assert (status, err) == (0, "")
    assert out.startswith("LlamaForCausalLM: 3 sweeps in ")
    assert "drive busy" in out and "bubbles" in out and "waited" in out


def test_timeline_draws_it(recorded, command, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = command("timeline", recorded, "--png", str(tmp_path / "out.png"))
    assert (status, err) == (0, "") and out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_and_a_report_need_a_file_each(llama, command, tmp_path):
    path = str(tmp_path / "out.json")
    status, out, err = command("run", llama, "--ids", "1", "--json", path, "--timeline", path)
    assert (status, out) == (2, "") and "each its own" in err


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["timeline"], 2, "FILE"),
        (["timeline", "./none.json"], 1, "none.json"),
        (["timeline", "FOLDER"], 1, "directory"),
        (["timeline", "TRACE", "--png", "out.svg"], 2, "PNG"),
        (["timeline", "TRACE", "--png", "./no-such-folder/out.png"], 2, "no-such-folder"),
        (["timeline", "OTHER"], 2, "no timeline of zinfer's"),
        (["timeline", "CUT"], 2, "cut off"),
        (["run", "MODEL", "--ids", "1", "--timeline", "./no-such-folder/out.json"], 2, "no-such-folder"),
        (["run", "MODEL", "--ids", "1", "--timeline", "FOLDER"], 2, "--timeline"),
        (["run", "MODEL", "--ids", "1", "--timeline", ""], 2, "--timeline"),
    ],
)
def test_wrong_input_gets_one_line(arguments, status, named, llama, command, tmp_path):
    pytest.importorskip("matplotlib")
    chrome.write(timeline(), tmp_path / "out.json")
    (tmp_path / "other.json").write_text(json.dumps({"traceEvents": []}))
    (tmp_path / "cut.json").write_text((tmp_path / "out.json").read_text()[:-20])
    meant = {
        "MODEL": llama,
        "FOLDER": str(tmp_path),
        "TRACE": str(tmp_path / "out.json"),
        "OTHER": str(tmp_path / "other.json"),
        "CUT": str(tmp_path / "cut.json"),
    }
    found, out, err = command(*[meant.get(argument, argument) for argument in arguments])
    assert (found, out) == (status, "")
    assert err.startswith("zinfer: error: ") and err.count("\n") == 1
    assert named in err
