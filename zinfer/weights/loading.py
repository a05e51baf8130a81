"""Build a transformers model whose parameters are symbolic, through transformers' own loader."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.utils import logging as transformers_logging

from zinfer.errors import CheckpointError, OptionError
from zinfer.weights.checkpoint import Checkpoint, read_json
from zinfer.weights.symbolic import SymbolicTensor

# from_pretrained keywords that say where files come from; they reach the config and the tokenizer, not the model.
HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# What transformers raises over a config with impossible values or an option it cannot take, and models over input that
# they do not expect. RuntimeError includes NotImplementedError and RecursionError.
REFUSALS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    *(AssertionError, OSError, StrictDataclassError),
)


def load_config(folder: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config in `folder` with `options` applied, and the options it did not use."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise CheckpointError(
            f"{folder}: no config.json in it; a checkpoint folder has one beside its shards"
        )
    try:
        config, unused = transformers.AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
    except REFUSALS as error:
        with_options = f" with {sorted(options)}" if options else ""
        raise CheckpointError(
            f"{folder}/config.json{with_options}: {_cause(error)}; transformers {transformers.__version__} "
            "cannot use it"
        ) from error
    return config, unused


def check_config(config: Any, folder: str) -> None:
    """Raises OptionError for what is no config, and CheckpointError for one that zinfer cannot stream."""
    if not isinstance(config, transformers.PreTrainedConfig):
        raise OptionError(f"config={config!r}: give a transformers config object, or leave it out")
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{folder}/config.json: the checkpoint is pre-quantised, which zinfer does not stream yet; "
            "use the unquantised checkpoint"
        )


def model_class(config: Any, folder: str, trust_remote_code: bool) -> type[nn.Module]:
    """The class that `config.architectures` names: transformers' own, or the checkpoint's with trust."""
    names = getattr(config, "architectures", None) or []
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        reference = next(
            (
                ref
                for auto, ref in auto_map.items()
                if auto.startswith("AutoModel") and ref.split(".")[-1] in names
            ),
            None,
        )
        if reference:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            try:
                return get_class_from_dynamic_module(reference, folder)
            except REFUSALS as error:
                raise CheckpointError(
                    f"{folder}: the checkpoint's own class {reference!r} cannot be loaded: {_cause(error)}"
                ) from error
    for name in names:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if not names:
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
            if type(config) in auto._model_mapping:
                mapped: Any = auto._model_mapping[type(config)]
                return mapped
    raise CheckpointError(
        f"{folder}/config.json: architectures {names} are unknown to transformers {transformers.__version__}; "
        "upgrade transformers, or pass trust_remote_code=True if the checkpoint brings its own code"
    )


def symbolic_model(
    checkpoint: Checkpoint, config: Any, cls: type[nn.Module], dtype: Any, options: dict[str, Any]
) -> nn.Module:
    """A `cls` whose loaded parameters and buffers are SymbolicTensors. Reads no weight byte.

    Raises CheckpointError for tensors that the checkpoint lacks or that have another shape, and
    OptionError for an option that transformers does not take.
    """
    with _quiet_progress(), _nothing_collected():
        state = {name: SymbolicTensor.of(entry) for name, entry in checkpoint.tensors.items()}
        try:
            model, info = _checking(cls, checkpoint).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except (OptionError, CheckpointError):
            raise
        except REFUSALS as error:
            if options:
                raise OptionError(
                    f"{cls.__name__} cannot be made with the options {sorted(options)}, which zinfer passes on to "
                    f"from_pretrained: {_cause(error)}"
                ) from error
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: {cls.__name__} cannot be made from it: {_cause(error)}"
            ) from error
    model.__class__ = cls
    _refuse_mismatches(checkpoint, info["mismatched_keys"])
    unread = {name for name, param in model.named_parameters() if not isinstance(param, SymbolicTensor)}
    _refuse_missing(checkpoint, model, unread | set(info["missing_keys"]))
    model.config.name_or_path = model.name_or_path = checkpoint.folder
    if model.can_generate() and "generation_config" not in options:
        _read_generation_config(model, os.path.join(checkpoint.folder, "generation_config.json"))
    return model


def _read_generation_config(model: Any, path: str) -> None:
    if os.path.lexists(path):
        read_json(path)
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(os.path.dirname(path))
        except REFUSALS as error:
            raise CheckpointError(f"{path}: {_cause(error)}; fetch it again, or remove it") from error


def _checking(cls: type[nn.Module], checkpoint: Checkpoint) -> type[nn.Module]:
    """`cls` with a look at what its loader found, before it initialises, in memory, all that did not fit."""

    def finalize(model: Any, load_config: Any, info: Any) -> Any:
        for name, text in info.conversion_errors.items():
            raise CheckpointError(
                f"{_file_of(checkpoint, name)}: {name!r} cannot be put together from the checkpoint's tensors, one "
                f"is missing or of another shape; fetch the checkpoint again ({text.strip().splitlines()[-1]}: "
                f"{_torch_error(text)})"
            )
        _refuse_mismatches(checkpoint, info.mismatched_keys)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        _refuse_missing(
            checkpoint, model, (info.missing_keys & parameters) - model.all_tied_weights_keys.keys()
        )
        return cls._finalize_model_loading(model, load_config, info)  # type: ignore[attr-defined]

    def load(model: Any, state: Any, files: Any, load_config: Any, *rest: Any) -> Any:
        for transform in load_config.weight_mapping or ():
            if type(transform) is WeightConverter:
                transform.__class__ = _Converter
        return cls._load_pretrained_model(model, state, files, load_config, *rest)  # type: ignore[attr-defined]

    extra = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "_finalize_model_loading": staticmethod(finalize),
        "_load_pretrained_model": staticmethod(load),
    }
    return type(cls.__name__, (cls,), extra)


def _torch_error(text: str) -> str:
    """The error's own line at the end of a formatted traceback with a note after it."""
    lines = [line for line in text.splitlines() if "Error: " in line and not line.startswith("Error")]
    return lines[-1].split("Error: ", 1)[1] if lines else "see the log"


def _cause(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _refuse_mismatches(checkpoint: Checkpoint, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    for name, found, wanted in sorted(mismatched):
        raise CheckpointError(
            f"{_file_of(checkpoint, name)}: tensor {name!r} has shape {list(found)}, the config asks for "
            f"{list(wanted)}; config.json and the weights do not belong together"
        )


def _refuse_missing(checkpoint: Checkpoint, model: nn.Module, missing: set[str]) -> None:
    if missing:
        shown = ", ".join(map(repr, sorted(missing)[:5])) + (" ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"{checkpoint.folder}: the checkpoint lacks {len(missing)} tensor(s) of {type(model).__name__}: "
            f"{shown}; zinfer never invents weights, use a checkpoint saved from this architecture"
        )


def _file_of(checkpoint: Checkpoint, name: str) -> str:
    """The shard that holds `name`, or its neighbours: the loader may have renamed or fused it."""
    entries = checkpoint.tensors.values()
    parts = name.split(".")
    named = [e for e in entries if e.name == name or e.name.endswith("." + ".".join(parts[-3:]))]
    beside = [e for e in entries if e.name.startswith(".".join(parts[:-1]) + ".")]
    return next((e.path for e in (*named, *beside)), checkpoint.folder)


class _Converter(WeightConverter):
    """A rule that is copied at once: transformers copies one for each tensor that an experts' weight is made from.

    Of DeepSeek-V3 those are 45 thousand. Copies share what a rule consists of; what they collect is their own.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Converter:
        made = copy.copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """transformers' bar counts tensors it does not read; it would only mislead."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Objects come by the hundred thousand, and to stay: looking for garbage among them takes half as long again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parameter_slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor, bool]]:
    """(module, attribute, full name, tensor, is_parameter) of every parameter and buffer, ties repeated."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, param in module._parameters.items():
            if param is not None:
                yield module, name, dot + name, param, True
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, dot + name, buffer, False
