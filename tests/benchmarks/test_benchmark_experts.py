"""The benchmarks of mixtures, from the command line to the results file, on models of a few megabytes."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import BenchmarkError, cgroup, evictions, experts, lookahead
from benchmarks.drive import drive_of
from benchmarks.evictions import FutureKnown, LeastRecent, Routing, hit_rate
from zinfer.synth import synthesise


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    try:
        drive_of(str(folder))
    except BenchmarkError as error:
        pytest.skip(str(error))
    return synthesise("qwen3-moe-tiny", str(folder / "moe-tiny"), progress=False)


def test_experts_compares_with_accelerate_and_measures_a_long_prompt(tiny, tmp_path, monkeypatch):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    try:
        with cgroup.memory_group(1 << 30):
            pass
    except BenchmarkError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(experts, "ROUTINGS", ("own",))
    out = tmp_path / "experts.json"
    sizes = ["--limit", "1GiB", "--rounds", "1", "--counted", "2", "--other-counted", "1", "--settling", "1"]
    sizes += ["--prefill", "8", "--probe-seconds", "0.1", "--patience", "0", "--repeats", "0"]
    experts.main(["--checkpoint", tiny, *sizes, "--scratch", str(tmp_path), "--json", str(out)])
    result = json.loads(out.read_text())
    names = [item["name"] for item in result["requirements"]]
    assert names[0] == "own routing: times faster a token than accelerate"
    assert any(name.startswith("long prompt") for name in names)
    ran = [tool for entry in result["rounds"] for tool in entry["runs"]]
    assert sorted(ran) == ["accelerate", "memory", "zinfer"]


def test_lookahead_takes_turns_on_one_model(tiny, tmp_path):
    out = tmp_path / "lookahead.json"
    sizes = ["--share", "0.6", "--rounds", "2", "--block", "2", "--settling", "2"]
    lookahead.main(["--checkpoints", tiny, *sizes, "--json", str(out)])
    result = json.loads(out.read_text())
    (found,) = result["rounds"]
    assert [len(found["blocks"][mode]) for mode in ("on", "off")] == [2, 2]
    assert result["requirements"][0]["bound"] == lookahead.WORSE


def test_evictions_records_what_models_pick_and_compares_policies(tmp_path, monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts": 16}
    monkeypatch.setattr(evictions, "CONFIG", evictions.CONFIG | small | {"num_experts_per_tok": 2})
    out = tmp_path / "evictions.json"
    evictions.main(["--tokens", "64", "--json", str(out)])
    result = json.loads(out.read_text())
    rates = result["figures"]
    assert max(rates, key=rates.get) == "the future known", "nothing beats that"
    assert rates["next use, half-life 32"] > 0
    top = {entry["skew"]: entry["top"] for entry in result["rounds"]}
    assert top["none"] < top["mild"] <= top["strong"]


def test_a_policy_is_told_what_was_picked_and_asked_who_goes():
    picked = np.array([[[0]], [[1]], [[2]], [[0]], [[1]], [[2]], [[0]], [[1]], [[2]]])
    routing = Routing(picked, 3)
    visits = routing.visits(1)
    assert visits[:2] == [(0, frozenset({0})), (0, frozenset({1}))]
    assert hit_rate(visits, LeastRecent(3), 2) == 0.0, "a cycle that is longer than the cache: LRU's worst"
    assert hit_rate(visits, FutureKnown(visits, 3), 2) > 0.3
    assert hit_rate(visits, LeastRecent(3), 3) > 0.8, "each misses once"
