"""Routers with favourites: random ones pick all experts alike, real ones do not.

A router has weights alone, so what it favours has to be seen in every state. The embedding of every token therefore
gets a component along (1, 1, ..., 1) as large as its own random part, and expert e's row of the router some of that
direction, by its rank in an order of its layer's own. Of logits with standard deviation s over tokens, that raises the
expert of rank r by -a s ln(r): popularity falls like a power of the rank (Zipf's law), the faster the larger a is.

    logit_e = W_e (x + 1) = (W_e - mean) x + d b_e,   x ~ N(0, 1) of width d

What layers add to the states is not along that direction, so that later layers favour less.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from zinfer.errors import OptionError
from zinfer.synth.inventory import Inventory, TensorSpec

STRENGTHS = {"none": 0.0, "mild": 3.0, "strong": 8.0}  # a, above
EMBEDDING = 1.0  # deviation and mean: about what the first layers add
_ROUTER = re.compile(r"(^|\.)(gate|router)(\.[a-z_]+)*\.weight$")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_skew(skew: str) -> None:
    """Raises OptionError for anything but the names in STRENGTHS."""
    if skew not in STRENGTHS:
        raise OptionError(f"router skew {skew!r}: choose {', '.join(STRENGTHS)}")


def skewed(inventory: Inventory, skew: str, seed: int) -> Inventory:
    """`inventory` with routers that favour some experts. Raises OptionError where the model has no router."""
    strength = STRENGTHS[skew]
    if not strength:
        return inventory
    config = inventory.model.config.get_text_config()
    count = next((value for name in _COUNTS if isinstance(value := getattr(config, name, None), int)), 0)
    is_router = [
        bool(_ROUTER.search(spec.name)) and len(spec.shape) == 2 and spec.shape[0] == count > 1
        for spec in inventory.tensors
    ]
    embedding = _embedding_name(inventory)
    if not any(is_router) or embedding is None:
        raise OptionError(
            f"router skew {skew!r}: {type(inventory.model).__name__} has no router of a mixture of experts, or no "
            "token embedding that it could show in; leave the option out"
        )
    tensors = []
    for spec, router in zip(inventory.tensors, is_router, strict=True):
        if router:
            spec = _favouring(spec, strength, seed)
        elif spec.name == embedding:
            spec = _marked(spec)
        tensors.append(spec)
    return Inventory(inventory.model, tensors)


def _embedding_name(inventory: Inventory) -> str | None:
    weight = inventory.model.get_input_embeddings().weight
    names = [name for name, tensor in inventory.model.named_parameters() if tensor is weight]
    known: Sequence[str] = [spec.name for spec in inventory.tensors]
    return next((name for name in names if name in known), None)


def _favouring(spec: TensorSpec, strength: float, seed: int) -> TensorSpec:
    """The router `spec` with favourites."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {spec.name}".encode()))
    count, width = spec.shape
    std = spec.std if spec.value is None else float(spec.value.float().std())
    rows = torch.randn(spec.shape, generator=generator) * std
    rows -= rows.mean(dim=1, keepdim=True)
    ranks = torch.randperm(count, generator=generator) + 1
    bias = -strength * std * math.sqrt(width) * ranks.float().log()
    rows += (bias / width)[:, None]
    return replace(spec, value=rows.to(spec.dtype))


def _marked(spec: TensorSpec) -> TensorSpec:
    """The embedding `spec` with the component that routers look for."""
    if spec.value is None:
        return replace(spec, mean=EMBEDDING, std=EMBEDDING)
    values = spec.value.float()
    scaled = values / values.std().clamp_min(1e-12) * EMBEDDING + EMBEDDING
    return replace(spec, value=scaled.to(spec.dtype))
