"""What holds on every device with memory of its own: run on the staged one in CI, and by tests/gpu on a GPU."""

from __future__ import annotations

import copy
import re

import torch
import transformers

import zinfer
from tests import architectures
from zinfer.device.cuda import STEP, allocated_by_torch
from zinfer.device.staged import StagedProcessor
from zinfer.kv_offload.layers import layers_on_host

CACHES = 64_000  # bytes: what the longest of most tests caches, and its activations
BUFFERS = 64 << 10  # bytes, the engine's
MIB = 1 << 20
IDS = torch.tensor([[5, 17, 33, 101, 200, 9, 77]])
ROWS = torch.randint(1, 255, (3, 7), generator=torch.Generator().manual_seed(3))
WINDOW = 6  # positions: shorter than the prompt, so that windows slide at once


def mixes(total: int) -> dict[str, tuple[int, int]]:
    """Budgets of device and host that make weights live on each tier, and on several."""
    return {
        "device": (4 * total, 2 * total),
        "device and host": (total // 2, 2 * total + BUFFERS),
        "device and nvme": (total // 2, 1),
        "all tiers": (total // 3, int(total * 0.8) + BUFFERS),
        "hardly anything": (1, 1),
    }


def run_within(folder: str, processor, device: int, host: int, **options):
    """Stream within `device` and `host` bytes, or within the fewest that work."""
    number, overhead = processor.number, processor.overhead
    if device > 1:  # else the fewest, and those caches beside them
        device += CACHES
    for _ in range(4):
        sizes = {number: overhead + device, "cpu": host}
        try:
            return zinfer.run(folder, device=processor, max_memory=sizes, **options)
        except zinfer.BudgetError as error:
            assert error.smallest is not None
            if "max_memory['cpu'] to that" in str(error):
                host = error.smallest
            else:
                device = error.smallest - overhead + CACHES
    raise AssertionError("no budget works")


class Rounding(StagedProcessor):
    """As torch's allocator on a GPU: a block takes more than what is in it, but no segment is half full."""

    overhead = STEP  # for the window

    def allocated(self, nbytes: int) -> int:
        """See Processor."""
        return allocated_by_torch(nbytes)

    def block(self, nbytes: int):
        """See Processor."""
        return super().block(self.allocated(nbytes))

    def limit(self, nbytes: int | None, holder: object = None) -> None:
        """See Processor."""
        super().limit(None if nbytes is None else nbytes + self.overhead, holder)


# Caches in host memory.


def sliding(**more):
    return transformers.MistralForCausalLM, transformers.MistralConfig(
        **architectures._HEADS, sliding_window=WINDOW, **more
    )


def slid_gemma(layers: int = 4):
    config = transformers.Gemma2Config(
        **(architectures._HEADS | {"num_hidden_layers": layers}), sliding_window=WINDOW
    )
    return transformers.Gemma2ForCausalLM, config


CACHED = {
    name: architectures.ALL[name] for name in ("llama", "gemma2", "gemma3", "gpt2", "mistral", "qwen3_moe")
}
CACHED |= {
    name: architectures.ALL[name] for name in ("deepseek_v3", "gpt_oss", "bloom", "falcon", "qwen3_next")
}
CACHED |= {"mistral_that_slides": sliding(), "gemma2_that_slides": slid_gemma()}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams that sample": {"num_beams": 3, "do_sample": True},
    "answers of beams": {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_new_tokens": 30},
    "prefill in chunks": {"prefill_chunk_size": 3},
}


def saved_of(source, folder: str, seed: int = 0):
    """Save the model that `source`, a name or (class, config), stands for; its class."""
    cls, config = CACHED[source] if isinstance(source, str) else source
    torch.manual_seed(seed)
    cls(copy.deepcopy(config)).save_pretrained(folder)
    return cls


def assert_generates_the_same(reference, model, ids, **settings):
    """Tokens and logits of the model in memory, by one whose caches are in host memory."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    answers = []
    for one in (reference, model):
        torch.manual_seed(11)
        given = copy.deepcopy(settings)
        answers.append(
            one.generate(ids.to(one.device), return_dict_in_generate=True, output_logits=True, **given)
        )
    expected, found = answers
    assert torch.equal(expected.sequences, found.sequences)
    for step, (there, here) in enumerate(zip(expected.logits, found.logits, strict=True)):
        assert torch.equal(there, here), f"logits of step {step}"
    assert layers_on_host(found.past_key_values), "the cache was on the device: the test proves nothing"
    assert not layers_on_host(expected.past_key_values)
    return found


def assert_a_static_cache_gives_the_same(reference, model, ids):
    """Tokens and logits of the model in memory, not compiled, by a streaming one, which never is."""
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    expected = reference.generate(ids, disable_compile=True, **settings)
    found = model.generate(ids, **settings)
    assert type(found.past_key_values) is transformers.StaticCache
    assert torch.equal(expected.sequences, found.sequences)
    assert all(torch.equal(there, here) for there, here in zip(expected.logits, found.logits, strict=True))


# Prompts in chunks.

PROMPT, PROMPTS, NEW = 384, 4, 4
SETTINGS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
# On a device that holds caches of the whole generation, but not the activations of the whole prompt.
CHUNKING = {"device": 24 * MIB - CACHES, "host": 32 * MIB}


def llama_in(folder: str):
    """14 MB of a llama; its class."""
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
    )
    return saved_of((transformers.LlamaForCausalLM, config), folder)


def long_prompts() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 500, (PROMPTS, PROMPT))


def chunk_said(model) -> int | None:
    """The size of the chunks of the last prompt that was cut, as the report says."""
    notes = [re.search(r"chunks of (\d+)", text) for text in model.zinfer.report().fallbacks]
    return next((int(note[1]) for note in notes if note), None)


def assert_chunks_are_equal(model, reference, ids, **settings):
    """The same logits, bit for bit, as in memory with chunks of the same size."""
    settings = SETTINGS | {"output_logits": True, "return_dict_in_generate": True} | settings
    ours = model.generate(ids, **settings)
    chunk = settings.pop("prefill_chunk_size", chunk_said(model))
    theirs = reference.generate(ids, prefill_chunk_size=chunk, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
