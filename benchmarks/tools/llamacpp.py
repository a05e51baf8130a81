"""llama.cpp through llama-cpp-python: the weights as a bf16 GGUF, mapped."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import BenchmarkError
from benchmarks.tools import Session

if TYPE_CHECKING:
    from benchmarks.worker import Task

PACKAGES = ("llama-cpp-python", "gguf", "numpy")
FILE = "model.gguf"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Llama's tensor. Raises BenchmarkError for one that has none."""
    if name in NAMES:
        return NAMES[name]
    prefix, _, rest = name.partition("model.layers.")
    number, _, inner = rest.partition(".")
    stem = inner.removesuffix(".weight")
    if prefix or stem not in LAYER_NAMES or stem == inner:
        raise BenchmarkError(f"{name}: not a tensor of a Llama; this GGUF writer knows only Llamas")
    return f"blk.{number}.{LAYER_NAMES[stem]}.weight"


def convert(checkpoint: str, target: str) -> None:
    """Write the checkpoint of a bf16 Llama to a file in the folder `target`, matrices in bf16, norms in float32.

    The vocabulary is made up: ids go in and out. llama.cpp rotates neighbouring elements, transformers halves of
    a head, so the rows of the query and key projections change places (as in llama.cpp's own converter).
    """
    import gguf
    import numpy

    config = json.loads(Path(checkpoint, "config.json").read_text())
    if config["model_type"] != "llama":
        raise BenchmarkError(f"{checkpoint}: {config['model_type']}; this GGUF writer knows only Llamas")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    key_heads, vocabulary = config["num_key_value_heads"], config["vocab_size"]
    writer = gguf.GGUFWriter(Path(target, FILE), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or hidden // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    tensors: list[tuple[str, Any]] = []
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise BenchmarkError(f"{name}: {entry['dtype']}; this GGUF writer knows only bf16")
            offset = 8 + length + entry["data_offsets"][0]
            words = numpy.memmap(path, numpy.uint16, "r", offset, tuple(entry["shape"]))
            tensors.append((name, words))
    for name, words in tensors:
        if words.ndim == 1:
            writer.add_tensor(gguf_name(name), (words.astype(numpy.uint32) << 16).view(numpy.float32))
            continue
        for part, count in ((".q_proj.", heads), (".k_proj.", key_heads)):
            if part in name:
                rows = words.shape[0] // count
                words = words.reshape(count, 2, rows // 2, -1).swapaxes(1, 2).reshape(words.shape)
        writer.add_tensor(gguf_name(name), words.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCppSession(Session):
    """One context with a sequence for each row, all in one buffer of keys and values."""

    def __init__(self, library: Any, task: Task) -> None:
        self._library = library
        options = library.llama_model_default_params()
        options.load_mode = library.LLAMA_LOAD_MODE_MMAP
        options.n_gpu_layers = 0
        path = Path(str(task.converted), FILE)
        self._model = library.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise BenchmarkError(f"llama.cpp could not load {path}")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        most = task.batch * len(task.prompt)
        context = library.llama_context_default_params()
        context.n_ctx = task.batch * (len(task.prompt) + task.new_tokens)
        context.n_batch = context.n_ubatch = most
        context.n_seq_max = task.batch
        context.kv_unified = True
        context.n_threads = context.n_threads_batch = task.threads
        self._context = library.llama_init_from_model(self._model, context)
        if not self._context:
            raise BenchmarkError(f"llama.cpp made no context for {task.batch} sequences")
        self._batch = library.llama_batch_init(most, 0, 1)
        self._length = 0

    def step(self, rows: list[list[int]]) -> list[int]:
        """See Session."""
        import numpy

        batch, added = self._batch, len(rows[0])
        batch.n_tokens = len(rows) * added
        for sequence, row in enumerate(rows):
            for place, token in enumerate(row):
                index = sequence * added + place
                batch.token[index] = token
                batch.pos[index] = self._length + place
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = place == added - 1
        status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise BenchmarkError(f"llama_decode returned {status}")
        self._length += added
        found = []
        for sequence in range(len(rows)):
            logits = self._library.llama_get_logits_ith(self._context, (sequence + 1) * added - 1)
            found.append(int(numpy.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()))
        return found

    def close(self) -> None:
        """Free batch, context and model."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


def prepare(task: Task) -> Callable[[], Session]:
    """See the package."""
    import numpy  # noqa: F401  # so that its import is not counted
    from llama_cpp import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    _kept.append(silent)
    llama_cpp.llama_backend_init()
    return lambda: LlamaCppSession(llama_cpp, task)


_kept: list[Any] = []  # C holds the callback, Python has to
