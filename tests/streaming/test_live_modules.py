"""Live modules: written to the store once, dropped from memory, streamed bit for bit, or left as they were."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from running import DEADLINE, IDS, run_tightly, smallest, tokens
from surgery import SHARD
from torch import nn

import zinfer
from tests import architectures
from zinfer.aio import Engine
from zinfer.errors import BudgetError, ClosedError, DriveError, OptionError, StoreError
from zinfer.weights.parameter import StreamedParameter

pytestmark = pytest.mark.usefixtures("nothing_left")


class Sharing(nn.Module):
    """Tied weights, a weight used outside its owner's forward, buffers, odd strides, frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(256, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.again = nn.Linear(64, 128)
        self.again.weight = self.up.weight
        self.turned = nn.Parameter(torch.randn(64, 96).t())
        self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        self.register_buffer("scale", torch.rand(64))
        self.head = nn.Linear(64, 256, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) * self.scale
        x = x + self.down(torch.relu(self.up(x)))
        x = x + torch.nn.functional.linear(torch.tanh(self.again(x)), self.down.weight)  # not by its owner
        x = x @ self.frozen + (x @ self.turned.t()) @ self.turned
        return self.head(x)


def make_sharing():
    return Sharing().eval()


def outputs(module, ids=IDS):
    with torch.no_grad():
        return [module(ids), module(ids[:, :1]), module(ids)]


def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("spare", [0, 30_000, 10_000_000])
def test_sharing_and_outside_use_stream_bit_for_bit(spare, tmp_path):
    expected = outputs(make_sharing())
    budget = smallest(make_sharing(), nvme_path=tmp_path)
    module = make_sharing()
    streamed = zinfer.run(module, offload="nvme", nvme_path=tmp_path, max_memory={"cpu": budget + spare})
    with streamed:
        assert streamed is module and isinstance(module, Sharing) and not module.training
        assert module.again.weight is module.up.weight
        assert module.head.weight is module.embed.weight
        assert not module.frozen.requires_grad and module.down.weight.requires_grad
        assert same(outputs(module), expected)
        assert same(outputs(module), expected)


def test_the_old_weights_leave_memory(tmp_path):
    module = make_sharing()
    weights = [weakref.ref(parameter) for parameter in module.parameters()]
    with zinfer.run(module, offload="nvme", nvme_path=tmp_path):
        gc.collect()
        assert [ref() for ref in weights if ref() is not None] == []


@pytest.mark.parametrize("shift", [0, 8, 24, 40, 1])
def test_a_model_loaded_from_a_file_stays_exact_at_any_alignment(shift, saved, tmp_path):
    """from_pretrained maps the file: the live weights stand where the header's length puts them."""
    shard = Path(saved("llama"), SHARD)
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    shard.write_bytes(
        (length + shift).to_bytes(8, "little")
        + content[8 : 8 + length]
        + b" " * shift
        + content[8 + length :]
    )
    load = transformers.LlamaForCausalLM.from_pretrained
    reference, live = load(shard.parent).eval(), load(shard.parent).eval()
    budget = 230_000
    with (
        zinfer.run(live, offload="nvme", nvme_path=tmp_path, max_memory={"cpu": budget}) as model,
        torch.no_grad(),
    ):
        for ids in (IDS, IDS[:, :1], IDS):
            assert torch.equal(reference(ids).logits, model(ids).logits)


def test_a_live_pretrained_model_generates(tmp_path):
    expected = tokens(architectures.build("qwen3_moe"))
    with zinfer.run(
        architectures.build("qwen3_moe"), nvme_path=tmp_path, max_memory={"cpu": 400_000}
    ) as model:
        assert isinstance(model, transformers.Qwen3MoeForCausalLM)
        assert tokens(model) == expected
        assert model.zinfer.report().bytes_written > 0


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_recurrent_layers_whose_weights_are_one_operators(recurrent, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"head": nn.Linear(64, 512), "rnn": recurrent(64, 64, 2, batch_first=True)}
        ).eval()

    x = torch.randn(2, 5, 64)
    reference = make()
    with run_tightly(make(), nvme_path=tmp_path) as module, torch.no_grad():
        for _ in range(2):
            assert torch.equal(module["rnn"](x)[0], reference["rnn"](x)[0])
            assert torch.equal(module["head"](x), reference["head"](x))


def test_attention_whose_two_matrices_do_not_fit_at_once(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.MultiheadAttention(64, 4).eval()

    x, reference = torch.randn(5, 2, 64), make()
    with run_tightly(make(), nvme_path=tmp_path) as module, torch.no_grad():
        for _ in range(2):
            assert same(module(x, x + 1, x), reference(x, x + 1, x))


def test_a_second_run_reuses_the_store(tmp_path):
    with zinfer.run(make_sharing(), nvme_path=tmp_path) as module:
        expected = outputs(module)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with zinfer.run(make_sharing(), nvme_path=tmp_path) as module:
        assert same(outputs(module), expected)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


# What fails leaves the module as it was


def untouched(module, expected, weights, training=True):
    assert [id(parameter) for parameter in module.parameters()] == weights
    assert type(module) is Sharing and not hasattr(module, "zinfer")
    assert module.training is training
    assert same(outputs(module.eval()), expected)


@pytest.mark.parametrize("why", ["budget", "drive", "store", "option", "attach", "interrupt"])
def test_a_module_that_cannot_be_taken_over_works_on_with_its_old_weights(why, tmp_path, monkeypatch):
    expected = outputs(make_sharing())
    module = make_sharing().train()
    weights = [id(parameter) for parameter in module.parameters()]
    options = {"nvme_path": tmp_path, "max_memory": {"cpu": 200_000}}
    if why == "budget":
        error, options["max_memory"] = BudgetError, {"cpu": 1}
    elif why == "drive":
        error = DriveError
        faults = [("error", 5)]
        monkeypatch.setattr(
            "zinfer.aio.drives.Engine", lambda backend, **rest: Engine("faults", faults=faults, **rest)
        )
    elif why == "store":
        error, options["nvme_path"] = StoreError, tmp_path / "absent"
    elif why == "option":
        error, options["revision"] = OptionError, "main"
    else:
        error = KeyboardInterrupt if why == "interrupt" else LookupError

        def fail(*_):
            raise error

        place = ("zinfer.run", "attach") if why == "attach" else ("zinfer.streaming", "StreamedParameter")
        monkeypatch.setattr(sys.modules[place[0]], place[1], fail)
    with pytest.raises(error):
        zinfer.run(module, **options)
    untouched(module, expected, weights)


def test_a_live_module_needs_a_place_and_takes_no_loading_options(tmp_path):
    module = make_sharing()
    weights = [id(parameter) for parameter in module.parameters()]
    for options, part in [
        ({}, "pass nvme_path="),
        ({"nvme_path": tmp_path, "offload": "none"}, "in memory already"),
        ({"nvme_path": tmp_path, "offload": "cpu"}, "in memory already"),
        ({"nvme_path": tmp_path, "dtype": "bfloat16"}, "dtype"),
        ({"nvme_path": tmp_path, "trust_remote_code": True}, "trust_remote_code"),
    ]:
        with pytest.raises(OptionError, match=part):
            zinfer.run(module, **options)
    untouched(module, outputs(make_sharing()), weights, training=False)
    assert os.listdir(tmp_path) == []


def test_modules_without_bytes_of_their_own_are_refused(tmp_path):
    with pytest.raises(OptionError, match="meta device"):
        zinfer.run(nn.Linear(4, 4, device="meta"), nvme_path=tmp_path)
    with pytest.raises(OptionError, match="no parameters"):
        zinfer.run(nn.ReLU(), nvme_path=tmp_path)
    with run_tightly(make_sharing(), nvme_path=tmp_path) as streamed:
        with pytest.raises(OptionError, match="streams already"):
            zinfer.run(streamed, nvme_path=tmp_path)
        with pytest.raises(OptionError, match="StreamedParameter"):
            zinfer.run(nn.Sequential(streamed.up, nn.ReLU()), nvme_path=tmp_path)
        assert isinstance(streamed.up.weight, StreamedParameter)


def test_a_closed_module_says_so(tmp_path):
    module = zinfer.run(make_sharing(), nvme_path=tmp_path)
    module.zinfer.close()
    with pytest.raises(ClosedError, match=r"zinfer\.run again"):
        module(IDS)


# Two processes

RACE = """
    import sys, torch, zinfer
    sys.path.insert(0, sys.argv[1])
    from test_live_modules import IDS, make_sharing, outputs, same
    expected = outputs(make_sharing())
    print("ready", flush=True)
    sys.stdin.readline()
    with zinfer.run(make_sharing(), offload="nvme", nvme_path=sys.argv[2], max_memory={"cpu": 250_000}) as module:
        print(all(same(outputs(module), expected) for _ in range(20)))
"""


def test_two_processes_share_one_store():
    with tempfile.TemporaryDirectory() as drive:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(RACE), str(Path(__file__).parent), drive],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": "1",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        try:
            for process in processes:
                assert process.stdout.readline() == "ready\n", process.stderr.read()
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in processes:
                out, errors = process.communicate(timeout=DEADLINE)
                assert out == "True\n", errors
        finally:
            for process in processes:
                process.kill()
                process.communicate(timeout=DEADLINE)
        assert len([path for path in Path(drive, "zinfer-store").iterdir() if path.is_dir()]) == 1
        assert not list(Path(drive).rglob("*.part"))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2),
            (2, 5, 32),
        ),
        (lambda: nn.LSTM(32, 48, 2, batch_first=True), (2, 5, 32)),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 64)), nn.Linear(64, 8)),
            (3, 32),
        ),
    ],
    ids=["fused encoder", "lstm", "weight norm"],
)
def test_modules_that_torch_runs_as_one_operator_are_exact_in_every_sweep(
    make, shape, tmp_path, nothing_left
):
    torch.manual_seed(0)
    module = make().eval()
    given = torch.randn(shape)
    old = [weakref.ref(parameter) for parameter in module.parameters()]

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        expected = first(module(given))
    try:
        zinfer.run(module, offload="nvme", nvme_path=tmp_path, max_memory={"cpu": 1})
    except zinfer.BudgetError as error:
        smallest = error.smallest
    with zinfer.run(module, offload="nvme", nvme_path=tmp_path, max_memory={"cpu": smallest}):
        for _ in range(3):
            assert torch.equal(first(module(given)), expected)
        gc.collect()
        assert not [reference for reference in old if reference() is not None]


def test_one_row_of_a_weight_stands_where_it_does_in_memory(tmp_path, nothing_left):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 50, 37))

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return torch.stack([nn.functional.linear(given, self.table[index]) for index in range(9)])

    torch.manual_seed(0)
    module, given = Rows().eval(), torch.randn(1, 37)
    with torch.no_grad():
        expected = module(given)
    with zinfer.run(module, offload="nvme", nvme_path=tmp_path, max_memory={"cpu": "150KB"}) as streamed:
        assert torch.equal(streamed(given), expected)
