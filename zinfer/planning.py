"""`zinfer.plan`: what a model would do on a machine, before a byte of it is read."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from zinfer.budgets import device_budget, less_kernels
from zinfer.device.choose import processor_for
from zinfer.device.processor import Processor
from zinfer.dry_run import DryRunError, dry_run
from zinfer.errors import BudgetError, OptionError
from zinfer.experts.forward import can_stream_experts, streams_experts, use_streamed_experts
from zinfer.hardware_probe import measured_machine, this_machine
from zinfer.kv_cache import Pass, activation_bytes, cache_growth, prefills_in_chunks
from zinfer.options import check_options, checked_dtype
from zinfer.outline import Outline, outline_of
from zinfer.parts import Held, Parts, gather, is_sliced
from zinfer.plan_task import Attached, Task
from zinfer.planner.assumed import Matrix, assumed_work
from zinfer.planner.chunks import chunks_of
from zinfer.planner.cost import Bounds, Operator, PassWork, Work, largest_batch, moved_bytes, sweep
from zinfer.planner.hardware import Hardware, checked_hardware, load_hardware
from zinfer.planner.memory import ceilings as ceilings_of_run
from zinfer.planner.memory import free_memory, parse_size
from zinfer.planner.plan import Plan, times
from zinfer.streaming import check_offload
from zinfer.weights.checkpoint import expected_shards
from zinfer.weights.lowering import Placed
from zinfer.wording import brief

logger = logging.getLogger("zinfer")

MOST_TOKENS = 1 << 24


def plan(
    model: Any,
    *,
    hardware: str | Hardware = "this",
    device: Any = None,
    max_memory: Mapping[Any, int | str] | None = None,
    batch: int = 1,
    prompt: int = 512,
    new_tokens: int = 32,
    offload: str = "nvme",
    dtype: str | torch.dtype = "auto",
    remeasure: bool = False,
    **options: Any,
) -> Plan:
    """Where the weights of `model` would live, and how fast it would generate.

    Args:
        model: a checkpoint folder, a config.json or a folder with one, a hub id (only its config is fetched), a
            built-in shape such as "llama-3.1-70b", or a transformers config object. No weights are needed.
        hardware: "this" measures the machine at hand once and keeps the figures; "a6000", "rtx4090" and "h200" are
            published ones; else a JSON file with the same fields, or a Hardware.
        device: where this machine would compute, as for zinfer.run: None for the GPU where there is one.
        max_memory: {"cpu": "8GiB", 0: "20GiB"}: ceilings as for zinfer.run; of other hardware, 0 is its device.
            Default: all of that hardware's memories but for headroom; of this machine, what is free.
        batch, prompt, new_tokens: sequences at once, tokens of each prompt, tokens generated for each.
        offload, dtype: as for zinfer.run. Of a model without weights, `dtype` is that of its checkpoint.
        remeasure: measure this machine again.
        options: further from_pretrained keywords, for a checkpoint folder: trust_remote_code, attn_implementation ...

    The weights' places are those that zinfer.run would choose within the same budgets. Times are predictions by the
    formula in planner/cost.py.

    Raises OptionError, CheckpointError and BudgetError (a budget too small or beyond the machine, a batch whose cache
    cannot fit), the last with the number that would work, if any does; nothing is read from the weights by then.
    """
    check_offload(offload)
    check_options(options, "zinfer.plan")
    _check_counts(batch=batch, prompt=prompt, new_tokens=new_tokens)
    if remeasure and hardware != "this":
        raise OptionError("remeasure has no effect on hardware other than 'this'")
    given = _hardware(hardware)  # its faults are told before the model is looked at
    if device is not None and given is not None:
        raise OptionError(
            f"device has no effect on hardware other than 'this': {given.name} says itself what computes there"
        )
    processor = processor_for(device) if given is None else None
    number = 0 if processor is None else processor.number
    ceilings = _ceilings(max_memory) if given is not None else _ceilings_here(max_memory, processor)
    with torch.inference_mode(False):
        outline = outline_of(model, checked_dtype(dtype), options)
        machine = given or this_machine(_places(outline), processor, refresh=remeasure)
        logger.debug("planning for %s", machine.as_dict())
        _check_ceilings(ceilings, machine, number)
        free = free_memory() if given is None else machine.host_memory
        there = None if processor is None else Attached(processor, device_budget(processor, ceilings.get(0)))
        return _planned(outline, machine, there, ceilings, free, offload, batch, prompt, new_tokens)


def predicted_sweep(
    folder: str,
    ceiling: int,
    offload: str,
    dtype: Any,
    options: Mapping[str, Any],
    batch: int,
    length: int,
    *,
    processor: Processor | None = None,
    on_device: int = 0,
) -> float | None:
    """Seconds of a decoding step with `length` positions so far, for a run that is under way; None if unknown.

    `ceiling`: the host's budget in bytes; `on_device`: that on `processor`, if one computes, its overhead taken off.
    Known once this machine has been measured (`zinfer plan MODEL`); nothing is measured here. Raises what plan() does.
    """
    machine = measured_machine(next(iter(expected_shards(folder))), processor)
    if machine is None:
        return None
    host: dict[str | int, int] = {"cpu": min(ceiling, machine.host_memory)}
    there = None if processor is None else Attached(processor, on_device)
    with torch.inference_mode(False):
        outline = outline_of(folder, checked_dtype(dtype), dict(options))
        # No prefill of that length.
        found = _planned(outline, machine, there, host, machine.host_memory, offload, batch, 1, length)
    return found.seconds_a_token


def _planned(
    outline: Outline,
    machine: Hardware,
    there: Attached | None,
    ceilings: dict[str | int, int],
    free: int,
    offload: str,
    batch: int,
    prompt: int,
    new_tokens: int,
) -> Plan:
    """The plan for `machine`: with the device `there`, as a run finds it; else the CPU's, or a published device's."""
    by_expert = streams_experts(outline.experts_asked, offload) and can_stream_experts(outline.model)
    held = gather(outline.model, by_expert=by_expert)
    by_expert = by_expert and any(map(is_sliced, held))
    if by_expert:
        use_streamed_experts(outline.model)
        free = free if machine.has_device else less_kernels(free)
    work, notes = _work(outline, held, batch, prompt, new_tokens)
    foreseen, estimate = _activations(outline, prompt), _estimate(outline, work, prompt)
    task = Task(held, work, machine, ceilings, offload, free, there, prompt, foreseen, estimate)
    task.by_expert = by_expert
    return _plan(outline, task, machine, batch, prompt, new_tokens, notes)


def _activations(outline: Outline, prompt: int) -> Callable[[int], int]:
    """What a run takes the pass over the prompt to hold at once, in bytes, for so many sequences."""
    config, itemsize = outline.model.config, outline.model.dtype.itemsize
    logits = 1 if outline.model.can_generate() else prompt
    return lambda batch: activation_bytes(config, itemsize, Pass(batch, prompt, logits))


def _plan(
    outline: Outline,
    task: Task,
    hardware: Hardware,
    batch: int,
    prompt: int,
    new_tokens: int,
    notes: list[str],
) -> Plan:
    largest = largest_batch(task.fits)
    try:
        parts, tiers = task.place(batch)
    except BudgetError as error:
        if largest:
            raise BudgetError(
                f"batch={batch} with {prompt + new_tokens} tokens each does not fit: {error}. The largest batch that "
                f"fits is {largest}",
                error.smallest,
            ) from error
        raise
    work, held = task.work, task.held
    position = {id(item): index for index, item in enumerate(held)}
    of_weight = [position[id(item)] for item in parts.large]
    small = {position[id(item)] for item in parts.small}
    sizes = [0] * len(held)
    for index, weight in zip(of_weight, parts.weights, strict=True):
        sizes[index] = weight.read_bytes
    device = frozenset(of_weight[i] for i in tiers.device)
    host = frozenset(of_weight[i] for i in tiers.host)
    decode = _with_conversions(work.decode, parts, of_weight, device | host)
    prefill = _with_conversions(work.prefill, parts, of_weight, frozenset())
    expert_bytes, hit_rate = task.expert_slots[0] * parts.largest_expert, None
    crossing = decode
    if parts.layers:
        sliced = {
            index for index, weight in zip(of_weight, parts.weights, strict=True) if weight.slices is not None
        }
        below, above = (slots / sum(layer.count for layer, _ in parts.layers) for slots in task.expert_slots)
        hit_rate = max(below, above)  # what was copied to the device came from the host
        crossing, decode = _with_hits(decode, sliced, above), _with_hits(decode, sliced, hit_rate)
    bounds = sweep(decode, sizes, hardware, device=device, host=host)
    bounds = replace(bounds, pcie=sweep(crossing, sizes, hardware, device=device, host=host).pcie)
    chunk = task.chunk(batch)
    chunks = chunks_of(prompt, chunk)
    first = _prefill_bounds(
        sweep(prefill, sizes, hardware),
        sweep(prefill, sizes, hardware, device=device, host=host),
        bounds,
        chunks,
    )
    if chunks > 1:
        notes = [
            *notes,
            f"the prompt is prefilled in {chunks} chunks of {chunk} tokens, each a sweep, so that activations fit",
        ]
    nbytes = [weight.nbytes for weight in parts.weights]
    on_device = sum(nbytes[i] for i in tiers.device)
    on_host = sum(nbytes[i] for i in tiers.host)
    host_budget, on_device_budget = task.budgets()
    if task.ceilings.get("cpu", 0) > host_budget:
        notes = [
            *notes,
            f"max_memory['cpu'] is {task.ceilings['cpu']} bytes; {host_budget} are planned with: what can be had, "
            "less headroom",
        ]
    if task.there is not None and task.ceilings.get(0, 0) > on_device_budget + task.there.processor.overhead:
        notes = [
            *notes,
            f"max_memory[{task.there.number}] is {task.ceilings[0]} bytes; {on_device_budget} are planned with: what "
            "can be had, less what anything takes there",
        ]
    small_bytes = task.on_device(parts).small_bytes if hardware.has_device else parts.small_bytes
    total = sum(nbytes) + small_bytes
    all_there = [slots * parts.largest_expert >= parts.expert_bytes for slots in task.expert_slots]
    # What is expected to be in the caches of experts; what is on the device came from the host's, and counts there.
    of_experts = [min(slots * parts.largest_expert, parts.sliced_bytes) for slots in task.expert_slots]
    on_device, on_host = on_device + of_experts[1], on_host + max(0, of_experts[0] - of_experts[1])
    return Plan(
        model=outline.name,
        hardware=hardware.name,
        dtype=outline.dtype,
        offload=task.offload,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        weight_bytes=total,
        device_bytes=on_device + (small_bytes if hardware.has_device else 0),
        host_bytes=on_host + (0 if hardware.has_device else small_bytes),
        nvme_bytes=total - small_bytes - on_device - on_host,
        small_bytes=small_bytes,
        host_budget=host_budget,
        device_budget=on_device_budget,
        host_window=tiers.host_window,
        device_window=tiers.device_window + tiers.device_conversions,
        conversion_bytes=tiers.conversions,
        buffer_bytes=parts.bounce,
        cache_bytes=work.cache_bytes,
        activation_bytes=task.activations(batch),
        sweep_bytes=round(moved_bytes(work.decode.asks, sizes, small)),
        read_bytes=round(moved_bytes(decode.asks, sizes, device | host)),
        pcie_bytes=round(moved_bytes(crossing.asks, sizes, device)) if hardware.has_device else 0,
        **times(bounds, first, batch, new_tokens),
        prefill_chunk=chunk,
        largest_batch=largest,
        expert_bytes=expert_bytes,
        device_expert_bytes=task.expert_slots[1] * parts.largest_expert,
        expert_hit_rate=hit_rate,
        notes=tuple(notes),
        sources=dict(hardware.sources),
        tiers={
            weight.name: "device"
            if i in tiers.device or (weight.slices is not None and all_there[1])
            else "host"
            if i in tiers.host or (weight.slices is not None and all_there[0])
            else "nvme"
            for i, weight in enumerate(parts.weights)
        },
    )


def _with_hits(work: PassWork, sliced: set[int], hit_rate: float) -> PassWork:
    """`work` where that share of the experts that it asks for, in the weights `sliced`, is in memory already."""
    asks = tuple((index, share * (1 - hit_rate) if index in sliced else share) for index, share in work.asks)
    return PassWork(work.operators, asks)


def _prefill_bounds(first: Bounds, later: Bounds, decode: Bounds, chunks: int) -> Bounds:
    """Of a prompt in `chunks` sweeps: `first` reads the residents too, and computes the whole prompt; `later` does not.

    Each sweep moves the weights through the processor, as a decoding step does, whatever the tokens in it are.
    """
    return Bounds(
        drive=first.drive + (chunks - 1) * later.drive,
        pcie=first.pcie + (chunks - 1) * later.pcie,
        compute=max(first.compute, chunks * decode.compute),
    )


def _estimate(outline: Outline, work: Work, prompt: int) -> Callable[[int, int], int] | None:
    """Bytes that a run foresees for the last of a batch's chunks; None where it cuts no prompt.

    Not less than the dry run found for as many tokens.
    """
    model = outline.model
    if not (model.can_generate() and prefills_in_chunks(model.config)):
        return None
    itemsize = getattr(torch, outline.dtype).itemsize
    ends = "logits_to_keep" in inspect.signature(model.forward).parameters

    def estimate(batch: int, tokens: int) -> int:
        found = -(-work.activation_bytes * batch * tokens // (work.batch * prompt))
        coming = Pass(batch, tokens, 1 if ends else tokens)
        return max(found, activation_bytes(model.config, itemsize, coming, prompt - tokens))

    return estimate


def _with_conversions(
    work: PassWork, parts: Parts, of_weight: Sequence[int], kept: frozenset[int]
) -> PassWork:
    """`work` and what replaying the weights that are not placed as they are costs: each is read and written again."""
    replays = [
        Operator("copy", str(weight.dtype).removeprefix("torch."), 1, 0, weight.read_bytes + weight.nbytes)
        for index, weight in zip(of_weight, parts.weights, strict=True)
        if index not in kept and not isinstance(weight.provenance, Placed)
    ]
    return PassWork((*work.operators, *replays), work.asks)


def _work(
    outline: Outline, held: Sequence[Held], batch: int, prompt: int, new_tokens: int
) -> tuple[Work, list[str]]:
    """The work by a dry run, or assumed where there is none, and what to note about it."""
    config, notes = outline.model.config.get_text_config(), []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and prompt + new_tokens > positions:
        notes.append(
            f"the model is made for {positions} positions; {prompt + new_tokens} may be more than it takes"
        )
    if outline.folder is None:
        notes.append(
            "planned from the config: the checkpoint is taken to be laid out as `zinfer synth` writes it"
        )
    if not outline.model.can_generate():
        notes.append("the model does not generate: a token stands for one pass over the whole prompt")
    try:
        return dry_run(outline.model, held, batch, prompt, new_tokens), notes
    except DryRunError as error:
        notes.append(
            f"the model cannot be run without data ({error}): 2 flops a weight and row are assumed, and a cache of "
            "keys and values in every layer"
        )
    matrices = [
        Matrix(index, item.tensor.numel(), item.tensor.numel() * item.tensor.dtype.itemsize, outline.dtype)
        for index, item in enumerate(held)
        if item.tensor.dim() > 1 and not isinstance(item.slots[0].owner, torch.nn.Embedding)
    ]
    itemsize = getattr(torch, outline.dtype).itemsize
    caches = outline.model.can_generate()

    def cache_at(tokens: int) -> int:
        # As a run foresees it: before there is a cache, its size comes from the config.
        return cache_growth(None, config, itemsize, Pass(batch, tokens, 1)).nbytes if caches else 0

    hidden = int(getattr(config, "hidden_size", 0) or 0) * itemsize
    work = assumed_work(matrices, batch, prompt, new_tokens, cache_at=cache_at, hidden=hidden)
    return work, notes


def _hardware(hardware: str | Hardware) -> Hardware | None:
    """The machine named; None for this one, which is measured once it is known which drive counts."""
    if isinstance(hardware, Hardware):
        return checked_hardware(hardware)
    if not isinstance(hardware, str) or not hardware:
        raise OptionError(f"hardware={brief(hardware)}: give 'this', a profile's name, a file, or a Hardware")
    return None if hardware == "this" else load_hardware(hardware)


def _places(outline: Outline) -> list[str]:
    """Paths on the drive that would be read: the shards, or the current folder for a model without weights."""
    return ["."] if outline.folder is None else list(expected_shards(outline.folder))


def _ceilings(max_memory: Mapping[Any, int | str] | None) -> dict[str | int, int]:
    if max_memory is None:
        return {}
    if not isinstance(max_memory, Mapping):
        raise OptionError(
            f"max_memory is {brief(max_memory)}; give a mapping such as {{'cpu': '8GiB', 0: '20GiB'}}"
        )
    unknown = [key for key in max_memory if key != "cpu" and (key != 0 or isinstance(key, bool))]
    if unknown:
        raise OptionError(
            f"max_memory has entries for {brief(unknown)}; the planner knows 'cpu' and the device 0"
        )
    return {key: parse_size(size) for key, size in max_memory.items()}


def _ceilings_here(
    max_memory: Mapping[Any, int | str] | None, processor: Processor | None
) -> dict[str | int, int]:
    """As _ceilings, for this machine: `processor` has the number, or name, that zinfer.run gives it."""
    number = None if processor is None else processor.number
    host, device = ceilings_of_run(max_memory, number)
    given: dict[str | int, int | None] = {"cpu": host, 0: device}
    return {key: size for key, size in given.items() if size is not None}


def _check_ceilings(ceilings: dict[str | int, int], hardware: Hardware, number: int) -> None:
    """Raises OptionError for a ceiling on a device that is not there, BudgetError for one above the machine."""
    if 0 in ceilings and not hardware.has_device:
        raise OptionError(
            f"max_memory[0] has no effect: {hardware.name} computes on the CPU; give 'cpu' alone"
        )
    for key, name, most in (
        ("cpu", "'cpu'", hardware.host_memory),
        (0, str(number), hardware.device_memory),
    ):
        if ceilings.get(key, 0) > most:
            raise BudgetError(
                f"max_memory[{name}] is {brief(ceilings[key])} bytes, but {hardware.name} has {most}; ask for at most "
                "that"
            )


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if type(value) is not int or not 1 <= value <= MOST_TOKENS:
            raise OptionError(f"{name}={brief(value)}: it is a whole number from 1 to {MOST_TOKENS}")
