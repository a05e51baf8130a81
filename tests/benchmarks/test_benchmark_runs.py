"""Each benchmark, from its command line to its results file, on models of a few megabytes."""

import importlib.util
import json

import pytest

from benchmarks import BenchmarkError, cgroup, depth, versus
from benchmarks.drive import drive_of
from benchmarks.tools.accelerate import disk_map
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


def test_depth_compares_two_models_of_one_width(tiny, tmp_path):
    out = tmp_path / "depth.json"
    sizes = [
        "--hidden",
        "256",
        "--layers",
        "3",
        "6",
        "--vocabulary",
        "512",
        "--rounds",
        "1",
        "--budget",
        "3MiB",
    ]
    assert depth.main(["--folder", str(tmp_path), *sizes, "--json", str(out)]) == 0
    result, required = content(out)
    assert len(required) == 3
    deep = result["rounds"][0]["deep"]["outcome"]["report"]
    assert deep["resident_bytes"] < deep["model_bytes"]


def test_depth_refuses_a_budget_that_holds_the_model(tmp_path):
    sizes = ["--hidden", "64", "--layers", "1", "2", "--vocabulary", "512", "--budget", "1GiB"]
    with pytest.raises(BenchmarkError, match="nothing would stream"):
        depth.main(["--folder", str(tmp_path), *sizes])


def test_a_failing_run_shows_the_end_of_its_output(tmp_path):
    with pytest.raises(BenchmarkError, match=r"(?s)failed with exit code 1.*config\.json"):
        depth.run_one(str(tmp_path), 1 << 20)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no \.safetensors file"):
        versus.main(["--checkpoint", str(tmp_path)])


def test_accelerate_gets_every_layer_on_disk_and_the_rest_in_memory(tiny):
    places = disk_map(tiny)
    assert {name for name, place in places.items() if place == "disk"} == {
        f"model.layers.{i}" for i in range(4)
    }
    assert places["lm_head"] == places["model.embed_tokens"] == "cpu"
