"""Each benchmark, from its command line to its results file, on models of a few megabytes."""

import importlib.util
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zinfer
from benchmarks import BenchmarkError, bench, bound, cgroup, growth, sweep, turns, versus, worker
from benchmarks.bench import PauseHost, RunFailed, tried_twice
from benchmarks.drive import drive_of
from benchmarks.tools.accelerate import disk_map
from benchmarks.turns import Turns, take_turns
from benchmarks.worker import UNCOUNTED, Task
from tests.benchmarks.runs import USAGE, a_run
from tests.planner.machines import cpu
from zinfer.synth import synthesise


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    try:
        drive_of(str(folder))
    except BenchmarkError as error:
        pytest.skip(str(error))
    return synthesise("llama-tiny", str(folder / "llama-tiny"), progress=False)


def content(path):
    result = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text().startswith(f"# {result['benchmark']}\n")
    return result, {item["name"]: item for item in result["requirements"]}


def test_versus_compares_zinfer_with_peers_and_with_memory(tiny, tmp_path):
    try:
        with cgroup.memory_group(1 << 30):
            pass
    except BenchmarkError as error:
        pytest.skip(str(error))
    peers = ["accelerate"] if importlib.util.find_spec("accelerate") else []
    out = tmp_path / "versus.json"
    sizes = ["--cells", "1GiB:3", "--headline", "1GiB:3", "--rounds", "1", "--counted", "2"]
    sizes += ["--probe-seconds", "0.1", "--scratch", str(tmp_path)]
    sizes += ["--keep-page-cache", "--patience", "0", "--repeats", "0"]
    tools = ["zinfer", "deepspeed", *peers, "memory"]
    versus.main(["--checkpoint", tiny, *sizes, "--tools", *tools, "--json", str(out)])
    result, required = content(out)
    (cell,) = result["rounds"]
    assert sorted(cell["runs"]) == sorted(["zinfer", *peers])
    assert cell["failed"] == {"deepspeed": "needs --peers-folder"}
    mine = cell["runs"]["zinfer"]["0"]["outcome"]
    assert len(mine["tokens"]) == 4 * 3
    assert mine["first_token"]["process"]["read"] >= mine["engine_first_token"] > 0
    assert mine["from_start"] > mine["import_seconds"] + mine["load_seconds"]
    assert len(mine["probe_rates"]) == len(mine["probes"]) == 2
    assert required["cells in which zinfer ran"]["met"]
    assert required["cells in which zinfer's tokens are memory's"]["met"]
    assert required["bytes zinfer wrote"]["met"]
    text = out.with_suffix(".md").read_text()
    assert text.count("| equal |") == len(["zinfer", *peers, "memory"])
    assert {path.name for path in tmp_path.iterdir()} == {"versus.json", "versus.md"}


@pytest.fixture
def in_this_process(monkeypatch):
    """Workers without their processes, each of which would import torch and transformers again."""

    def here(task, limit, drive, **_):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "outcome.json")
            host = PauseHost(task, out, drive)

            def take(pauses):
                worker.Pauses.asked(out, pauses._number).touch()
                host.look()
                pauses._number += 1

            monkeypatch.setattr(worker.Pauses, "take", take)
            outcome = worker.work(task, drive, out)
            Path(out).write_text(json.dumps(asdict(outcome)))
            return bench.Run(host.fill(worker.read_outcome(out)), replace(USAGE, peak_anonymous=1))

    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "run_one", here)
    yield
    torch.set_num_threads(threads)


def test_a_worker_without_a_group_decodes_a_batch_and_the_drive_is_measured_twice_a_pause(tiny):
    task = Task(
        "zinfer", tiny, [5, 6, 7], 5, 1, batch=4, max_memory=4 << 20, probe_seconds=0.05, probe_bytes=16 << 20
    )
    run = bench.run_one(task, None, drive_of(tiny), grouped=False)
    assert run.usage.peak_anonymous > 4 << 20
    assert run.usage.max_usage is None
    assert len(run.outcome.tokens) == 5 * 4
    assert len(run.outcome.tokens_each) == 3
    assert len(run.outcome.probe_rates) == len(run.outcome.memory_rates) == 2
    assert run.account <= 4 << 20


def test_with_and_without_zinfer_take_turns_on_the_same_tensors(tiny):
    overhead = take_turns(Turns(tiny, [1, 2, 3], pairs=4, threads=1))
    assert len(overhead.zinfer) == len(overhead.plain) == 4
    assert overhead.tokens_equal


def test_turns_are_taken_with_every_weight_resident(tiny):
    model = zinfer.run(tiny, offload="nvme", max_memory={"cpu": turns.roomy(tiny)}, progress=False)
    with model, torch.no_grad():
        assert turns.streamed_weights(model)
        turns.settle(model, [1, 2, 3])
        assert not turns.streamed_weights(model)


def test_weights_that_never_become_resident_end_the_turns(tiny, monkeypatch):
    monkeypatch.setattr(turns, "SETTLE_SECONDS", 0)
    with (
        zinfer.run(tiny, offload="nvme", max_memory={"cpu": 4 << 20}, progress=False) as model,
        pytest.raises(BenchmarkError, match="still stream"),
    ):
        turns.settle(model, [1])


def test_the_sweep_holds_every_cell_against_its_bound(tiny, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr(sweep, "measured_now", lambda _: cpu())
    monkeypatch.setattr(sweep, "predicted", lambda *_: 0.01)
    monkeypatch.setattr(sweep, "take_turns", lambda _: bound.Overhead([1.01, 1.01], [1.0, 1.0], True))
    out = tmp_path / "sweep.json"
    cells = ["--percent", "60", "120", "--batches", "1", "3", "--rounds", "1", "--counted", "2", "3"]
    cells += ["--probe-seconds", "0.05", "--probe-memory", "16MiB", "--patience", "0"]
    sweep.main(["--checkpoint", tiny, *cells, "--repeats", "0", "--json", str(out)])
    result, required = content(out)
    assert required["tokens equal at each batch (1: yes)"]["met"]
    assert required["everything resident: s a token with zinfer / without"]["met"]
    assert required["runs that failed twice"]["met"]
    assert result["figures"]["hardware"]["name"] == cpu().name
    assert required["zinfer's account with the KV cache / budget"]["met"]
    runs = result["rounds"][0]["cells"]
    assert list(runs) == ["60 %, batch 1", "120 %, batch 1", "60 %, batch 3", "120 %, batch 3"]
    outcome = runs["60 %, batch 3"]["outcome"]
    assert len(outcome["tokens"]) == (3 + UNCOUNTED + sweep.SETTLING) * 3
    assert len(outcome["probe_rates"]) == len(outcome["memory_rates"]) == 2
    assert len(outcome["tokens_each"]) == 3
    in_memory = result["rounds"][0]["in_memory"]["3"]["outcome"]["report"]
    streamed = in_memory["swept_bytes"] - outcome["resident"]
    assert in_memory["first_swept_bytes"] > in_memory["swept_bytes"]
    assert outcome["report"]["cache_bytes"] > 0
    for token in outcome["tokens_each"]:
        # A weight, a tenth of this model, may be read ahead for the next token or not.
        assert streamed * 0.8 < token["process"]["read"] < streamed * 1.2 + bound.ROW_EDGES * 3
    assert runs["120 %, batch 3"]["outcome"]["resident"] > outcome["resident"]
    assert outcome["resident_each"] == [outcome["resident"]] * 4
    ahead = outcome["read_ahead"]
    read = outcome["rested"]["process"]["read"] - (ahead[1] - ahead[0])
    assert 0.99 * streamed < read / 4 < 1.05 * streamed + bound.ROW_EDGES * 3, (
        "pages that weights share count twice"
    )


def test_the_sweep_asks_the_planner_for_each_cell(monkeypatch):
    asked, machine = [], cpu()

    def plan(checkpoint, **options):
        asked.append((checkpoint, options))
        return SimpleNamespace(seconds_a_token=1.5)

    monkeypatch.setattr(zinfer, "plan", plan)
    assert sweep.predicted(machine, "checkpoint", 7 << 20, 32, 16, 11) == 1.5
    options = {"max_memory": {"cpu": 7 << 20}, "batch": 32, "prompt": 16, "new_tokens": 11}
    assert asked == [("checkpoint", {"hardware": machine, **options})]


def test_the_sweep_refuses_a_model_that_does_not_fit_memory(tiny, monkeypatch):
    monkeypatch.setattr(sweep.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    with pytest.raises(BenchmarkError, match="take a smaller model"):
        sweep.main(["--checkpoint", tiny])


def test_growth_compares_models_of_one_width(tiny, tmp_path, in_this_process):
    out = tmp_path / "growth.json"
    sizes = ["--hidden", "256", "--layers", "3", "6", "9", "--budget", "3MiB", "--rounds", "1"]
    sizes += ["--probe-memory", "8MiB", "--new-tokens", "3", "--probe-seconds", "0.05"]
    sizes += ["--patience", "0", "--repeats", "0"]
    growth.main(["--folder", str(tmp_path), *sizes, "--json", str(out)])
    result, required = content(out)
    assert len(required) == 6
    assert required["runs that failed twice"]["met"]
    # One weight is a tenth of this budget: the accounts differ by what does not fit, but none is above.
    assert required["growth of zinfer's account, x1 to the largest"]["measured"] < 0.15
    assert all(spread["high"] <= 3 << 20 for spread in result["figures"]["peaks"]["zinfer's account"])
    reports = [run["outcome"]["report"] for run in result["rounds"][0].values()]
    assert all(report["resident_bytes"] < report["model_bytes"] for report in reports)
    read = [run["outcome"]["decode"]["process"]["read"] for run in result["rounds"][0].values()]
    assert read == sorted(set(read))


def test_growth_refuses_a_budget_that_holds_the_smallest_model(tmp_path):
    sizes = ["--hidden", "64", "--layers", "1", "2", "3", "--budget", "1GiB"]
    with pytest.raises(BenchmarkError, match="nothing would stream"):
        growth.main(["--folder", str(tmp_path), *sizes])


def test_a_failing_run_shows_the_end_of_its_output(tmp_path, tiny):
    task = Task("zinfer", str(tmp_path), [1], 3, 1)
    with pytest.raises(bench.RunFailed, match=r"(?s)^zinfer failed: .*config\.json"):
        bench.run_one(task, None, drive_of(tiny), grouped=False)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no \.safetensors file"):
        versus.main(["--checkpoint", str(tmp_path)])


def test_accelerate_gets_every_layer_on_disk_and_the_rest_in_memory(tiny):
    places = disk_map(tiny)
    assert {name for name, place in places.items() if place == "disk"} == {
        f"model.layers.{i}" for i in range(4)
    }
    assert places["lm_head"] == places["model.embed_tokens"] == "cpu"


def test_a_run_that_fails_once_is_repeated_and_one_that_fails_twice_is_told(capsys):
    outcomes = iter(
        [RunFailed("zinfer", "first", "tail"), 7, RunFailed("zinfer", "second", ""), BenchmarkError("x\ny")]
    )

    def work():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    failed = []
    assert tried_twice(work, "a", failed) == 7
    assert not failed
    assert tried_twice(work, "b", failed) is None
    assert failed == ["b: x"]
    assert "first" in capsys.readouterr().err


class EveryOtherFails:
    """A Bench whose runs of one label fail."""

    def __init__(self, label):
        self.label, self.discarded = label, []

    def run(self, task, limit, label=""):
        if label == self.label:
            raise RunFailed("zinfer", "no reason", "")
        return a_run()


def test_a_cell_that_fails_loses_neither_its_round_nor_the_others(tiny, monkeypatch):
    cells = [bound.Cell(50, 1 << 20, 1), bound.Cell(75, 2 << 20, 1)]
    options = sweep._parse(["--checkpoint", tiny, "--batches", "1", "--counted", "3"])
    overhead = bound.Overhead([1.0], [1.0], True)
    monkeypatch.setattr(sweep, "take_turns", lambda _: overhead)
    found = sweep.Sweep(options, tiny, cells, EveryOtherFails("50 %, batch 1"))
    found.round(0)
    found.bench.label = "in memory, batch 1"
    found.round(1)
    found.bench.label = "none"
    found.round(2)
    assert found.failed == ["50 %, batch 1, round 1: no reason", "in memory, batch 1, round 2: no reason"]
    assert [len(found.points[cell]) for cell in cells] == [1, 2]
    assert len(found.overheads) == len(found.rounds) == 3
    assert list(found.rounds[0]["cells"]) == ["75 %, batch 1"]
    assert found.rounds[1]["in_memory"] == {}
