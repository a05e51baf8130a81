"""The result stays a Hugging Face model: what users do with one works, or explains itself."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
import transformers

import zinfer
from tests import architectures
from zinfer.synth import synthesise
from zinfer.weights.parameter import StreamedParameter

IDS = torch.tensor([[5, 17, 33, 101]])
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def folder(saved):
    return saved("llama")


@pytest.fixture
def model(folder, nothing_left):
    reference = architectures.ALL["llama"][0].from_pretrained(folder)
    budget = int(0.5 * architectures.parameter_bytes(reference))
    with zinfer.run(folder, offload="nvme", max_memory={"cpu": budget}) as streamed:
        yield streamed


def streamed_parameter(model) -> StreamedParameter:
    return next(p for p in model.parameters() if isinstance(p, StreamedParameter))


def test_it_is_a_pretrained_model_of_its_class(model, folder):
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert model.num_parameters() == sum(p.numel() for p in architectures.build("llama").parameters())


def test_looking_at_parameters_reads_no_bytes(model):
    before = model.zinfer.report().bytes_read
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, torch.nn.Parameter)
        assert name and parameter.shape and parameter.numel() and parameter.dtype and parameter.stride()
        assert repr(parameter)
    assert repr(model)
    model.get_input_embeddings()
    assert model.zinfer.report().bytes_read == before


def test_moving_to_where_it_is_does_nothing_and_elsewhere_is_explained(model):
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert model.float() is model
    assert model.eval() is model
    for move in (lambda: model.to(torch.float16), lambda: model.half(), lambda: model.to("meta")):
        with pytest.raises(zinfer.OptionError, match=r"\.to\(\)"):
            move()


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.copy_(torch.zeros(p.shape)),
        lambda p: p.__iadd__(1),
        lambda p: p.__setitem__(0, 0),
        lambda p: setattr(p, "data", torch.zeros(p.shape)),
        torch.nn.init.normal_,
        lambda p: torch.add(p, 1, out=p),
    ],
)
def test_streamed_weights_refuse_writes(model, write):
    with pytest.raises(zinfer.ReadOnlyError, match="read-only"):
        write(streamed_parameter(model))


def test_pickling_and_saving_explain_themselves(model, tmp_path):
    with pytest.raises(zinfer.ZinferError, match="checkpoint"):
        pickle.dumps(model)
    with pytest.raises(zinfer.ZinferError, match="checkpoint"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(zinfer.ZinferError):
        torch.save(streamed_parameter(model), tmp_path / "one.pt")


def test_a_deep_copy_streams_the_same_weights(model):
    expected = model.generate(IDS, **SETTINGS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(IDS, **SETTINGS), expected)
    assert streamed_parameter(twin).weight is streamed_parameter(model).weight


def test_calls_with_grad_enabled_build_no_graph(model):
    assert torch.is_grad_enabled()
    logits = model(IDS).logits
    assert logits.grad_fn is None
    assert not logits.requires_grad


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_can_be_made_and_used_under_any_guard(folder, guard, nothing_left):
    with torch.no_grad():
        expected = architectures.ALL["llama"][0].from_pretrained(folder).eval()(IDS).logits
    with guard():
        model = zinfer.run(folder, offload="nvme", max_memory={"cpu": "400KB"})
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, expected)
    model.zinfer.close()


def test_submodules_can_be_called_by_themselves(model, folder):
    reference = architectures.ALL["llama"][0].from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model.model(IDS).last_hidden_state, reference.model(IDS).last_hidden_state)
        assert torch.equal(model.lm_head(torch.ones(1, 64)), reference.lm_head(torch.ones(1, 64)))


def test_streamers_and_pipelines_work(tmp_path, nothing_left):
    out = synthesise("llama-tiny", str(tmp_path / "tiny"), progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    with zinfer.run(out, offload="nvme", max_memory={"cpu": "3MB"}) as model:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert pipe("Hello", generation_config=settings)[0]["generated_text"].startswith("Hello")
        streamer = transformers.TextIteratorStreamer(tokenizer, timeout=60)
        inputs = tokenizer("Hello", return_tensors="pt")
        thread = threading.Thread(
            target=model.generate, kwargs={**inputs, "generation_config": settings, "streamer": streamer}
        )
        thread.start()
        assert "".join(streamer).startswith("Hello")
        thread.join(60)
        assert not thread.is_alive()


def test_use_after_close_is_an_error_and_close_is_idempotent(folder, nothing_left):
    model = zinfer.run(folder, offload="nvme", max_memory={"cpu": "400KB"})
    model(IDS)
    model.zinfer.close()
    model.zinfer.close()
    assert model.zinfer.closed
    with pytest.raises(zinfer.ClosedError, match="closed"):
        model(IDS)


def test_a_model_that_is_dropped_without_close_gives_everything_back(folder, nothing_left):
    model = zinfer.run(folder, offload="nvme", max_memory={"cpu": "400KB"})
    model(IDS)
    del model
    gc.collect()


def test_the_report_is_text_and_plain_data(model):
    model.generate(IDS, **SETTINGS)
    report = model.zinfer.report()
    assert "GB/s" in str(report)
    data = report.as_dict()
    assert data["sweeps"] == SETTINGS["max_new_tokens"]
    assert data["bytes_read"] > 0
    assert data["budget"] >= data["planned_resident_bytes"] + data["window_bytes"] + data["small_bytes"]
