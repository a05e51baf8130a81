"""What versus.py plans and what it makes of its runs. No process is started here."""

import json
import sys

import pytest

from benchmarks import BenchmarkError, tools, versus
from benchmarks.bench import RunFailed
from benchmarks.cells import Cell, Found, Step, difference, plan, seconds_left
from benchmarks.peers import PEERS, TOOLS, python_of
from benchmarks.tools import deepspeed, llamacpp
from benchmarks.versus_tables import cell_table, requirements, rounds_table, summary_table
from tests.benchmarks.runs import GB, a_run

CELL = Cell.parse("3GiB:1")
OTHER = Cell.parse("1GiB:32")
ALL = list(TOOLS)


def found(cell=CELL, **seconds):
    return Found(
        cell,
        {
            tool: {n: a_run(tool, seconds=s, first=s) for n, s in enumerate(times)}
            for tool, times in seconds.items()
        },
    )


def met(cells, headline=None, names=ALL, references=None):
    required = requirements(cells, headline, names, references or {}, 7 * GB)
    return {item.name: item for item in required}


def test_a_cell_is_a_limit_and_a_batch():
    assert (CELL.limit, CELL.batch, CELL.name) == (3 << 30, 1, "3GiB:1")
    for wrong in ("3GiB", "3GiB:", "3GiB:0", "3GiB:x"):
        with pytest.raises(BenchmarkError, match="a cell is LIMIT:BATCH"):
            Cell.parse(wrong)


def test_the_order_turns_round_and_a_slow_tool_runs_once_a_cell():
    steps = plan([CELL, OTHER], ["zinfer", "airllm", "memory"], {CELL: 2, OTHER: 1})
    assert steps == [
        Step(CELL, 0, "zinfer"),
        Step(CELL, 0, "airllm"),
        Step(CELL, 1, "zinfer"),
        Step(OTHER, 0, "zinfer"),
        Step(OTHER, 0, "airllm"),
    ]
    two = plan([CELL], ["zinfer", "accelerate"], {CELL: 2})
    assert [step.tool for step in two] == ["zinfer", "accelerate", "accelerate", "zinfer"]


def test_the_time_left_is_each_tools_own_mean_or_the_usual_one():
    steps = [Step(CELL, 0, "zinfer"), Step(CELL, 0, "airllm")]
    assert seconds_left(steps, {}) is None
    assert seconds_left(steps, {"zinfer": [1.0, 3.0], "accelerate": [6.0]}) == 2 + 4


def test_tokens_are_compared_row_by_row_over_the_steps_that_both_have():
    assert difference([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], 2) == "equal"
    assert difference([1, 2, 3, 9], [1, 2, 3, 4, 5, 6], 2) == "1 of 2 rows differ"


def test_ratios_are_taken_within_each_round():
    cell = found(zinfer=[1.0, 2.0, 3.0], accelerate=[10.0, 4.0, 10.0])
    assert cell.ratios("accelerate") == pytest.approx([10, 2, 10 / 3])
    assert found(zinfer=[1.0, 2.0], airllm=[8.0]).ratios("airllm") == [8.0]


def test_only_undisturbed_rounds_count_where_there_are_enough():
    cell = found(zinfer=[1.0] * 4, accelerate=[2.0] * 4)
    cell.runs["accelerate"][1] = a_run("accelerate", seconds=9.0, foreign_cpu=99.0)
    assert cell.ratios("accelerate") == [2.0] * 3
    assert len(cell.of("zinfer")) == 4
    del cell.runs["accelerate"][3]
    assert cell.ratios("accelerate") == [2.0, 9.0, 2.0]


def test_each_peer_has_its_own_factor_in_the_headline_cell():
    cell = found(zinfer=[1.0], deepspeed=[1.7], llamacpp=[1.7], accelerate=[3.0], airllm=[7.0])
    required = met([cell], cell)
    ratio = "seconds a token at 3GiB:1, {} / zinfer"
    assert required[ratio.format("DeepSpeed ZeRO-3 NVMe")].met
    assert not required[ratio.format("llama.cpp mmap")].met
    assert required[ratio.format("accelerate disk offload")].met
    assert not any("AirLLM" in name for name in required)
    assert ratio.format("llama.cpp mmap") not in met([cell], None)


def test_a_ratio_that_there_is_not_counts_as_none():
    name = "seconds a token at 3GiB:1, DeepSpeed ZeRO-3 NVMe / zinfer"
    without_peer = found(zinfer=[1.0], accelerate=[3.0])
    assert met([without_peer], without_peer)[name].measured == 0
    without_zinfer = found(deepspeed=[3.0])
    assert met([without_zinfer], without_zinfer)[name].measured == 0
    assert name not in met([without_peer], without_peer, ["zinfer", "accelerate"])


def test_a_peer_that_ran_nowhere_is_a_comparison_that_was_not_made():
    name = "peers that ran in a cell at least"
    cells = [found(zinfer=[1.0], accelerate=[3.0]), found(OTHER, zinfer=[1.0], deepspeed=[3.0])]
    names = ["zinfer", "accelerate", "deepspeed"]
    assert met(cells, None, names)[name].met
    assert not met(cells, None, [*names, "airllm"])[name].met


def test_where_zinfer_did_not_run_every_peer_that_did_was_ahead():
    required = met([found(accelerate=[9.0], airllm=[9.0])])
    assert required["peers as fast a token or faster, over all cells"].measured == 2
    assert required["peers whose first token came sooner, over all cells"].measured == 2


def test_a_cell_in_which_zinfer_failed_in_any_round_does_not_count_as_run_and_says_why():
    cell = found(zinfer=[1.0, 1.0], deepspeed=[9.0, 9.0, 9.0])
    cell.failed["zinfer"] = "in round 3: killed: out of memory"
    required = met([cell], cell, ["zinfer", "deepspeed"])
    assert not required["cells in which zinfer ran"].met
    assert required["seconds a token at 3GiB:1, DeepSpeed ZeRO-3 NVMe / zinfer"].measured == 0
    row = cell_table(cell, ["zinfer"], None).splitlines()[2]
    assert row.startswith("| zinfer | failed in round 3: killed: out of memory | 1.00 |")


def test_a_peer_that_failed_in_a_later_round_says_so_beside_its_figures():
    cell = found(zinfer=[1.0, 1.0], deepspeed=[2.0])
    cell.failed["deepspeed"] = "in round 2: stopped after 900 s"
    row = cell_table(cell, ["zinfer", "deepspeed"], None).splitlines()[3]
    assert "| 2.00 x; failed in round 2: stopped after 900 s | 2.00 |" in row
    assert "2.00 (then failed)" in summary_table([cell], ["zinfer", "deepspeed"], "seconds_a_token", 2)


def test_a_run_that_fails_later_is_told_with_its_round(monkeypatch):
    class Failing:
        def run(self, task: object, limit: int) -> object:
            ran.append(task)
            if len(ran) == 2:
                raise RunFailed("zinfer", "no memory", "")
            return a_run()

    ran: list[object] = []
    options = versus._parse(["--checkpoint", "x", "--tools", "zinfer"])
    compared = versus.Versus(options, "x", "s", ["zinfer"], Failing(), {CELL: Found(CELL)})
    monkeypatch.setattr(compared, "task", lambda tool, batch, counted: (tool, batch, counted))
    compared.run_cells({CELL: 3}, CELL)
    assert compared.cells[CELL].failed == {"zinfer": "in round 2: no memory"}
    assert list(compared.cells[CELL].runs["zinfer"]) == [0]
    assert len(ran) == 2


def test_a_cells_title_tells_how_many_rounds_it_has():
    assert found(zinfer=[1.0], accelerate=[1.0, 1.0]).title == "3GiB, batch 1 (2 rounds)"
    assert found(OTHER, zinfer=[1.0]).title == "1GiB, batch 32 (1 round)"


def test_a_peer_that_is_as_fast_anywhere_is_counted():
    ahead, behind = found(zinfer=[1.0], accelerate=[2.0]), found(OTHER, zinfer=[1.0], accelerate=[1.0])
    faster = "peers as fast a token or faster, over all cells"
    assert met([ahead])[faster].met
    assert met([ahead, behind])[faster].measured == 1
    assert met([ahead, behind])["peers whose first token came sooner, over all cells"].measured == 1


def test_a_cell_in_which_zinfer_did_not_run_is_missed():
    required = met([found(zinfer=[1.0]), found(OTHER, accelerate=[1.0])])
    assert not required["cells in which zinfer ran"].met


def test_only_zinfers_tokens_have_to_be_those_of_memory():
    reference = {1: a_run("memory")}
    name = "cells in which zinfer's tokens are memory's"
    cell = found(zinfer=[1.0], accelerate=[2.0])
    cell.runs["accelerate"][0] = a_run("accelerate", tokens=(9, 9, 9))
    assert met([cell], None, ALL, reference)[name].met
    cell.runs["zinfer"][0] = a_run(tokens=(1, 2, 9))
    assert not met([cell], None, ALL, reference)[name].met
    assert not met([cell], None, ALL, {})[name].met
    assert name not in met([cell], None, ["zinfer", "accelerate"])


def test_the_tables_show_ratios_reasons_and_rounds():
    cell = found(zinfer=[1.0, 1.0], accelerate=[2.0, 4.0])
    cell.failed["deepspeed"] = "killed: out of memory"
    names = ["zinfer", "deepspeed", "accelerate", "memory"]
    rows = cell_table(cell, names, a_run("memory", tokens=(1, 2, 4))).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["", "killed: out of memory", "3.00 (2.00-4.00) x", ""]
    assert "1 of 1 rows differ" in rows[0]
    assert len({row.count("|") for row in rows}) == 1
    assert "| 3GiB, batch 1 (2 rounds) | 1.00 | - | 3.00 |" in summary_table(
        [cell], names, "seconds_a_token", 2
    )
    assert "| 2 | 1.000 | 4.000 |" in rounds_table(cell, names)


def test_every_tool_has_its_module_and_tells_the_packages_it_uses():
    for tool in TOOLS.values():
        module = __import__(f"benchmarks.tools.{tool.name}", fromlist=["prepare"])
        assert module.PACKAGES
        assert callable(module.prepare)
        assert tool.converts == hasattr(module, "convert")
    assert "zinfer" not in PEERS
    assert "memory" not in PEERS


def test_a_tool_whose_venv_is_missing_says_how_to_make_it(tmp_path):
    assert python_of(TOOLS["accelerate"], None) == sys.executable
    with pytest.raises(BenchmarkError, match="--peers-folder"):
        python_of(TOOLS["deepspeed"], None)
    with pytest.raises(BenchmarkError, match=r"make it: python -m benchmarks\.peers"):
        python_of(TOOLS["deepspeed"], str(tmp_path))


def test_a_comparison_without_zinfer_is_refused(capsys):
    with pytest.raises(SystemExit):
        versus.main(["--checkpoint", "x", "--tools", "accelerate"])
    assert "--tools must name zinfer" in capsys.readouterr().err


def test_a_headline_that_is_no_cell_is_refused(capsys):
    with pytest.raises(SystemExit):
        versus.main(["--checkpoint", "x", "--cells", "1GiB:1", "--headline", "3GiB:1"])
    assert "--headline 3GiB:1 is not one of the --cells" in capsys.readouterr().err


def test_gguf_names_are_those_of_a_llama():
    assert llamacpp.gguf_name("lm_head.weight") == "output.weight"
    assert llamacpp.gguf_name("model.layers.12.mlp.up_proj.weight") == "blk.12.ffn_up.weight"
    for stranger in ("model.layers.0.mlp.experts.weight", "model.layers.0.self_attn.q_proj.bias"):
        with pytest.raises(BenchmarkError, match="only Llamas"):
            llamacpp.gguf_name(stranger)


def test_deepspeeds_buffers_hold_the_largest_parameter_in_elements(tmp_path):
    header = {"__metadata__": {}, "a": {"data_offsets": [0, 600]}, "b": {"data_offsets": [600, 800]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert deepspeed.largest_parameter(str(tmp_path)) == 300
    chosen = deepspeed.settings(64, 300, 32, "scratch")["zero_optimization"]["offload_param"]
    assert chosen["buffer_size"] == 300


def test_a_tool_without_a_session_of_its_own_cannot_decode():
    with pytest.raises(TypeError, match="abstract"):
        tools.Session()
