"""Each benchmark, from its command line to its results file, on models of a few megabytes."""

import importlib.util
import json

import pytest

from benchmarks import BenchmarkError, cgroup, decode, depth, worker
from benchmarks.drive import drive_of
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


def test_decode_compares_zinfer_with_a_peer_and_with_memory(tiny, tmp_path):
    try:
        with cgroup.memory_group(1 << 30):
            pass
    except BenchmarkError as error:
        pytest.skip(str(error))
    peers = ["accelerate"] if importlib.util.find_spec("accelerate") else []
    out = tmp_path / "decode.json"
    sizes = ["--limit", "1GiB", "--rounds", "1", "--new-tokens", "3", "--probe-seconds", "0.1"]
    sizes += ["--keep-page-cache", "--patience", "0", "--repeats", "0"]
    decode.main(["--checkpoint", tiny, *sizes, "--peers", *peers, "--json", str(out)])
    result, required = content(out)
    assert list(result["rounds"][0]) == ["zinfer", *peers]
    assert required["tokens equal in every run (1: yes)"]["met"]
    assert required["bytes zinfer wrote"]["met"]
    assert required["processes killed"]["met"]
    assert len(result["figures"]["in_memory"]["outcome"]["tokens"]) == 3
    mine = result["rounds"][0]["zinfer"]
    assert mine["outcome"]["first_token"]["process"]["read"] >= mine["outcome"]["engine_first_token"] > 0
    assert len(mine["outcome"]["probe_rates"]) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("offload-")] == []


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
    with pytest.raises(BenchmarkError, match=r"(?s)missing failed with exit code 1.*FileNotFoundError"):
        depth.run_one(str(tmp_path / "missing"), 1 << 20)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no \.safetensors file"):
        decode.main(["--checkpoint", str(tmp_path)])


def test_the_peer_gets_every_layer_on_disk_and_the_rest_in_memory(tiny):
    places = worker.disk_map(tiny)
    assert {name for name, place in places.items() if place == "disk"} == {
        f"model.layers.{i}" for i in range(4)
    }
    assert places["lm_head"] == places["model.embed_tokens"] == "cpu"
