"""It stays a Hugging Face model, and says so clearly where it cannot."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from running import DEADLINE, IDS, run_tightly, tokens, window_in_use

import zinfer
from tests import architectures
from zinfer.errors import ClosedError, OptionError, ReadOnlyError, ZinferError
from zinfer.synth.tokenizer import byte_tokenizer
from zinfer.weights.parameter import StreamedParameter

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def reference():
    return architectures.build("llama")


@pytest.fixture
def model(saved):
    with run_tightly(saved("llama"), spare=150_000) as model:
        yield model


def streamed(model):
    """A parameter that streams."""
    return next(
        p for p in model.parameters() if isinstance(p, StreamedParameter) and not p.weight.wants_residence
    )


def test_it_is_a_pretrained_model(model):
    assert isinstance(model, transformers.PreTrainedModel) and isinstance(
        model, transformers.LlamaForCausalLM
    )
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert not model.training
    assert isinstance(streamed(model), torch.nn.Parameter)
    assert model.num_parameters() == architectures.build("llama").num_parameters()


def test_moving_it_where_it_is_does_nothing_and_elsewhere_is_explained(model, reference):
    for same in (model.to("cpu"), model.to(torch.float32), model.cpu(), model.float(), model.eval()):
        assert same is model
    for move in (
        lambda: model.to(torch.bfloat16),
        model.half,
        model.double,
        lambda: model.to("meta"),
        lambda: model.to_empty(device="cpu"),
    ):
        with pytest.raises(OptionError, match=r"pass dtype=.*zinfer\.run"):
            move()
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="computes on cpu"):
            model.to("cuda")
    assert tokens(model) == tokens(reference)


# Text


def test_pipelines_and_streamers_work_unchanged(model, reference):
    tokenizer = byte_tokenizer(model.config)
    settings = {"max_new_tokens": 8, "do_sample": False}
    made = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("Hello", **settings)
    expected = transformers.pipeline("text-generation", model=reference, tokenizer=tokenizer)(
        "Hello", **settings
    )
    assert made == expected
    inputs = tokenizer("Hello", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    text = tokenizer.decode(reference.generate(**inputs, **settings)[0], skip_special_tokens=True)
    streamer = transformers.TextIteratorStreamer(tokenizer, timeout=DEADLINE, skip_special_tokens=True)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, **settings, "streamer": streamer}, daemon=True
    )
    thread.start()
    assert "".join(streamer) == text
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_text_streamer_prints_the_same(model, reference, capsys):
    tokenizer = byte_tokenizer(model.config)
    printed = []
    for one in (reference, model):
        one.generate(IDS, max_new_tokens=6, do_sample=False, streamer=transformers.TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


# Looking at it


def test_looking_reads_no_bytes(saved):
    with run_tightly(saved("llama")) as model:
        before = model.zinfer.bytes_read
        assert "LlamaDecoderLayer" in repr(model)
        for name, parameter in model.named_parameters():
            assert parameter.shape == dict(architectures.build("llama").named_parameters())[name].shape
            assert repr(parameter) and str(parameter.dtype) and parameter.device.type == "cpu"
            assert parameter.numel() == parameter.shape.numel() and parameter.grad is None
        assert len(model.state_dict()) == 21
        assert model.get_memory_footprint() > 0
        assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
        copy.deepcopy(model)
        model.requires_grad_(False)
        model.zero_grad()
        assert model.zinfer.bytes_read == before


def test_the_embedding_alone_reads_its_rows(model, reference):
    with torch.no_grad():
        assert torch.equal(model.get_input_embeddings()(IDS), reference.get_input_embeddings()(IDS))


# Copies


def test_a_deep_copy_shares_the_weights(model, reference):
    assert tokens(model) == tokens(reference)  # so that there are residents
    resident = model.zinfer.resident_bytes
    assert resident > model.zinfer.report().small_bytes
    twin = copy.deepcopy(model)
    assert twin is not model and twin.model is not model.model and twin.config is not model.config
    ours = {p.weight for p in twin.parameters() if isinstance(p, StreamedParameter)}
    report = model.zinfer.report()
    assert sum(weight.nbytes for weight in ours) + report.small_bytes == report.model_bytes
    assert tokens(twin) == tokens(model) == tokens(reference)
    assert tokens(copy.copy(model)) == tokens(reference)
    assert twin.zinfer is model.zinfer
    model.zinfer.close()
    with pytest.raises(ClosedError):
        tokens(twin)


def test_tied_parameters_stay_tied_in_a_copy(saved):
    with run_tightly(saved("llama_tied")) as model:
        twin = copy.deepcopy(model)
        assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_copy_of_a_model_in_memory_is_its_own(saved, reference):
    with zinfer.run(saved("llama"), offload="none") as model:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        assert tokens(model) == tokens(reference)


# Saving


def test_saving_is_refused_before_anything_is_written_or_read(model, tmp_path):
    before = model.zinfer.bytes_read
    target = tmp_path / "out"
    with pytest.raises(ReadOnlyError, match=r"save_pretrained: .*copy those files"):
        model.save_pretrained(target)
    assert not target.exists()
    for save in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
        with pytest.raises(ZinferError, match="cannot be pickled"):
            save(model)
        with pytest.raises(ZinferError, match="no bytes to pickle or save"):
            save(dict(model.state_dict()))
        with pytest.raises(ZinferError, match="no bytes to pickle or save"):
            save(streamed(model))
    assert model.zinfer.bytes_read == before


def test_saving_over_its_own_checkpoint_is_refused_and_harmless(saved, reference):
    folder = saved("llama")
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    with run_tightly(folder) as model:
        with pytest.raises(ReadOnlyError):
            model.save_pretrained(folder)
        assert tokens(model) == tokens(reference)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == files


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_model_in_memory_can_be_saved(offload, saved, tmp_path, reference):
    with zinfer.run(saved("llama"), offload=offload) as model:
        model.save_pretrained(tmp_path / "out")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert tokens(again) == tokens(reference)


# Writing


def add_in_place(parameter):
    parameter += 1


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.copy_(torch.zeros(())),
        lambda p: setattr(p, "data", torch.zeros(p.shape)),
        lambda p: setattr(p, "grad", torch.zeros(p.shape)),
        add_in_place,
        lambda p: p.data.add_(1),
        lambda p: p.__setitem__(0, 0.0),
        torch.nn.init.normal_,
        torch.nn.init.zeros_,
        lambda p: torch.nn.init.constant_(tensor=p, val=0.0),
        lambda p: torch.add(p.shape[0], torch.zeros(p.shape), out=p),
        lambda p: torch._foreach_add_([p], 1),
        lambda p: p.requires_grad_(False).mul_(2),
        lambda p: torch.relu_(p),
        lambda p: torch.nn.functional.relu(p, inplace=True),
    ],
)
def test_streamed_parameters_refuse_writes(write, model, reference):
    with pytest.raises(ReadOnlyError, match=r"'(model|lm_head)\..*read-only"):
        write(streamed(model))
    assert tokens(model) == tokens(reference)


def test_methods_that_change_weights_are_refused_as_a_whole(model, reference):
    tokens(model)
    with pytest.raises(ReadOnlyError, match=r"resize_token_embeddings: .*offload='none'"):
        model.resize_token_embeddings(300)
    with pytest.raises(ReadOnlyError, match=r"load_state_dict: .*zinfer\.run"):
        model.load_state_dict(
            {name: torch.zeros_like(value) for name, value in reference.state_dict().items()}
        )
    assert model.config.vocab_size == 256
    assert tokens(model) == tokens(reference)


def test_embeddings_of_a_model_in_memory_can_be_resized(saved, reference):
    reference.resize_token_embeddings(100)
    with zinfer.run(saved("llama"), offload="none") as model:
        model.resize_token_embeddings(100)
        assert tokens(model, IDS[:, :3]) == tokens(reference, IDS[:, :3])


# Modes


def test_it_generates_in_train_mode_too(model, reference):
    assert tokens(model.train()) == tokens(reference)
    assert model.training
    assert tokens(model.eval()) == tokens(reference)


def test_no_graph_is_made_and_the_window_is_kept(model, reference):
    with torch.no_grad():
        expected = reference(IDS, labels=IDS)
    for _ in range(3):
        out = model(IDS, labels=IDS, output_hidden_states=True)
        assert torch.is_grad_enabled() and not out.logits.requires_grad and out.loss.grad_fn is None
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
        assert window_in_use(model) <= model.zinfer.report().window_bytes
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected.logits)
    assert torch.equal(model(IDS).logits, expected.logits), "what inference mode made does for later passes"


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_can_be_made_and_used_under_any_guard(guard, saved, reference):
    with torch.no_grad():
        expected = reference(IDS).logits
    with guard():
        model = run_tightly(saved("llama"), spare=150_000)
        assert torch.equal(model(IDS).logits, expected)
    with model:
        assert torch.equal(model(IDS).logits, expected)


def test_parts_of_the_model_can_be_called_alone(saved):
    reference = architectures.build("t5")
    with run_tightly(saved("t5")) as model, torch.no_grad():
        for _ in range(2):
            ours, theirs = model.encoder(IDS), reference.encoder(IDS)
            assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
            assert torch.equal(
                model.lm_head(ours.last_hidden_state), reference.lm_head(theirs.last_hidden_state)
            )
        assert tokens(model) == tokens(reference)


# The end


def test_the_report_is_text_and_plain_data(model):
    tokens(model, count=5)
    report = model.zinfer.report()
    assert "GB/s" in str(report)
    data = report.as_dict()
    assert data["sweeps"] == 5
    assert data["bytes_read"] > data["model_bytes"]
    parts = ("planned_resident_bytes", "window_bytes", "small_bytes", "bounce_bytes", "conversion_bytes")
    assert sum(data[part] for part in parts) <= data["budget"]
    assert data["pool_bytes"] >= data["planned_resident_bytes"] + data["window_bytes"]
    assert data["huge_page_bytes"] is None or 0 <= data["huge_page_bytes"] <= data["pool_bytes"]
    assert "of it on huge pages" in str(report)
    assert "an unknown part of it" in str(replace(report, huge_page_bytes=None))


def test_after_the_end_no_pool_is_reported(model):
    tokens(model, count=2)
    model.zinfer.close()
    gc.collect()
    report = model.zinfer.report()
    assert (report.pool_bytes, report.huge_page_bytes) == (0, 0)


def test_a_with_block_closes_and_later_use_says_so(saved):
    with run_tightly(saved("llama")) as model:
        assert repr(model.zinfer).endswith("0 sweeps>")
    assert model.zinfer.closed and repr(model.zinfer).endswith("closed>")
    for use in (lambda: model(IDS), lambda: tokens(model), lambda: model.lm_head(torch.zeros(1, 64))):
        with pytest.raises(ClosedError, match=r"zinfer\.run again"):
            use()
    assert model.zinfer.report().model_bytes > 0
    model.zinfer.close()
    model.zinfer.close()
    assert model.num_parameters() > 0


@pytest.mark.parametrize("offload", ["auto", "cpu", "none"])
def test_a_model_that_fits_in_memory_closes_too(offload, saved):
    with zinfer.run(saved("llama"), offload=offload) as model:
        assert tokens(model)
    with pytest.raises(ClosedError, match=r"zinfer\.run again"):
        model(IDS)


def test_an_error_in_the_with_block_closes_and_is_not_hidden(saved):
    with pytest.raises(LookupError, match="mine"), run_tightly(saved("llama")) as model:
        raise LookupError("mine")
    assert model.zinfer.closed


@pytest.mark.parametrize("used", [False, True])
def test_a_model_that_is_forgotten_gives_everything_back(used, saved):
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    model = run_tightly(saved("llama"), spare=40_000)
    if used:
        tokens(model)
    assert len(os.listdir("/proc/self/task")) > threads
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert len(os.listdir("/proc/self/task")) <= threads


def test_a_tensor_that_outlives_the_model_keeps_its_bytes(saved, reference):
    model = run_tightly(saved("llama"))
    kept = model.lm_head.weight.T
    model.zinfer.close()
    del model
    gc.collect()
    assert torch.equal(kept, reference.lm_head.weight.T)
