"""The notebook runs from top to bottom on a machine without a GPU, and shows what it promises."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbclient
import nbformat
import pytest

from tests.planner.machines import measure_quickly
from zinfer.device import choose
from zinfer.device.staged import StagedProcessor

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "single_a6000_large_model.ipynb"
MODEL_GB = 0.08
SECONDS = 240  # that a cell may take
BATCHES = [1, 2, 4, 8, 16]
pytestmark = pytest.mark.timeout(
    600
)  # the first test runs all of it: 40 s on two cores that nobody else uses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder):
    """The notebook with its outputs; an exception in a cell is one here."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = os.environ | {
        "ZINFER_NOTEBOOK_FOLDER": str(folder),
        "ZINFER_NOTEBOOK_GB": str(MODEL_GB),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return notebook


def text_under(notebook, heading: str) -> str:
    """What the cells below the heading that begins with `heading`, up to the next one, put out as text."""
    found, inside = [], False
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^##? (.*)", cell.source, re.MULTILINE)):
            inside = match[1].startswith(heading)
        elif inside and cell.cell_type == "code":
            found += [text_of(output) for output in cell.outputs]
    assert found, f"nothing under {heading!r}"
    return "\n".join(found)


def text_of(output) -> str:
    if output.output_type == "stream":
        return output.text
    return output.get("data", {}).get("text/markdown", output.get("data", {}).get("text/plain", ""))


def rows_of(text: str) -> list[list[str]]:
    """The cells of a table's lines, without heading and rule."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) > 2, f"no table in {text!r}"
    return lines[2:]


def pictures_of(notebook) -> list[bytes]:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    encoded = (output.get("data", {}).get("image/png") for output in outputs)
    return [base64.b64decode(picture) for picture in encoded if picture]


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert NOTEBOOK.stat().st_size < 200_000


def test_every_cell_runs_and_none_complains(executed):
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    complaints = [output.text for output in outputs if output.get("name") == "stderr"]
    # Others compute while the tests run.
    assert [text for text in complaints if "other programs were computing" not in text] == []


def test_the_machine_is_looked_at_and_measured(executed):
    text = text_under(executed, "1.")
    assert re.search(r"\d+ problem\(s\), \d+ note\(s\)", text)
    rates = [float(rate.split()[0]) for _, rate in rows_of(text)]
    assert len(rates) == 3 and all(rate > 0 for rate in rates)


def test_four_large_models_are_planned_for_an_a6000(executed):
    text = text_under(executed, "2.")
    rows = {row[0]: row[1:] for row in rows_of(text)}
    gigabytes = {name: [int(cell.removesuffix(" GB")) for cell in row[:4]] for name, row in rows.items()}
    weights = {"Llama-3.1-405B": 812, "DeepSeek-V3": 1342, "OPT-175B": 350, "BLOOM-176B": 353}
    assert {name: sizes[0] for name, sizes in gigabytes.items()} == pytest.approx(weights, rel=0.01)
    for whole, card, host, drive in gigabytes.values():
        assert 0 < card <= 51 and 0 < host <= 271 and drive > 0
        assert card + host + drive == pytest.approx(whole, abs=2)
    for name, row in rows.items():
        seconds, rate, largest = float(row[4].removesuffix(" s")), float(row[5]), int(row[7])
        assert rate == pytest.approx(8 / seconds, rel=0.05), name
        assert row[6] in ("drive", "pcie", "compute") and largest >= 8
        # No faster than the drive brings what is not in memory, where all of it is asked for.
        assert name == "DeepSeek-V3" or seconds >= 0.97 * gigabytes[name][3] / 5.6
    assert "RTX A6000" in text  # the whole plan of one of them


def test_the_model_has_the_size_asked_for(executed, folder):
    assert re.search(r"layers, 0\.0[789] GB", text_under(executed, "3."))
    shards = list(folder.rglob("*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) == pytest.approx(MODEL_GB * 1e9, rel=0.05)


def test_it_runs_within_the_share_of_memory_that_an_a6000_machine_has(executed):
    said = re.search(
        r"^the CPU computes within (\S+) GB a model of (\S+) GB$", text_under(executed, "4."), re.M
    )
    within, size = map(float, said.groups())
    assert within / size == pytest.approx((51 + 270) / 812, rel=0.05)
    report = text_under(executed, "5.")
    last = re.search(r"last sweep +(\S+) (\S+) from the drive, (\S+) (\S+) from host memory", report)
    streamed, resident = (float(last[n]) * {"MiB": 2**20, "GiB": 2**30}[last[n + 1]] for n in (1, 3))
    assert 0.5 * size * 1e9 < streamed < size * 1e9
    assert 0 < resident < within * 1e9


def test_there_are_a_timeline_and_a_plot(executed, folder):
    images = pictures_of(executed)
    assert len(images) == 2
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images)
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    rows = [event["pid"] for event in events if event["ph"] == "X"]
    assert rows.count(0) >= 8  # sweeps, one a token
    assert rows.count(1) > 100 and rows.count(3) > 100  # reads, operators


def test_larger_batches_make_more_tokens_a_second_as_predicted(executed):
    rows = rows_of(text_under(executed, "7."))
    assert [int(row[0]) for row in rows] == BATCHES
    measured, predicted = ([float(row[column]) for row in rows] for column in (1, 2))
    assert measured[-1] > measured[0] > 0
    assert predicted[-1] > 2 * predicted[0] > 0
    ratios = [one / other for one, other in zip(measured, predicted, strict=True)]
    assert ratios == pytest.approx([float(row[3]) for row in rows], abs=0.02)


def test_the_tokens_are_those_of_the_model_in_memory(executed):
    said = text_under(executed, "8.")
    assert f"batches of {', '.join(map(str, BATCHES))}: all tokens equal those of the model in memory" in said


def test_the_same_cells_run_with_a_device(tmp_path, monkeypatch, capsys):
    """The staged one, played by the CPU, where a GPU would be found; what this machine and others are is left out."""
    monkeypatch.setenv("ZINFER_NOTEBOOK_FOLDER", str(tmp_path))
    monkeypatch.setenv("ZINFER_NOTEBOOK_GB", "0.03")
    measure_quickly(monkeypatch)
    processor = StagedProcessor(1 << 30)
    monkeypatch.setattr(choose, "processor_for", lambda device, *, timed: processor)
    names = {"largest": SimpleNamespace(device_budget=300, host_budget=260, weight_bytes=812)}
    backend, heading = matplotlib.get_backend(), ""
    matplotlib.use("agg")
    try:
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "markdown":
                found = re.search(r"^##? (.*)", cell.source, re.MULTILINE)
                heading = found[1] if found else heading
            elif not heading.startswith(("1.", "2.")):
                exec(compile(cell.source, cell.id, "exec"), names)
    finally:
        matplotlib.use(backend)
    said = capsys.readouterr().out
    assert "staged computes within" in said
    assert names["machine"].has_device and 0 in names["ceilings"]
    assert {name for plan in names["plans_here"].values() for name in plan.tiers.values()} >= {"host", "nvme"}
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    copies = [event for event in events if event["ph"] == "X" and event["pid"] == 2]
    assert len(copies) > 100  # to the device
    assert "all tokens equal those of the model in memory" in said
    assert list(names["answers"]) == BATCHES


def test_what_suits_the_machine_is_asked_of_the_device(tmp_path, monkeypatch):
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
    source = cells["cell-14"].partition("config = ")[0]
    names = {"FOLDER": str(tmp_path), "processor": StagedProcessor(3 << 20)}
    exec(compile(f"{cells['cell-02']}\n{source}", "cells", "exec"), names)
    assert names["what_suits"]() == 1 << 20
