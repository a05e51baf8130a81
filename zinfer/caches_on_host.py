"""Puts the caches that a model makes into host memory, and refuses passes whose caches do not fit there."""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from zinfer.budgets import CACHE_SHARE
from zinfer.device.attached import AttachedDevice
from zinfer.device.host import bounce_bytes
from zinfer.errors import BudgetError
from zinfer.kv_cache import Pass, cache_growth
from zinfer.kv_offload.lane import Lane
from zinfer.kv_offload.layers import is_empty, layers_on_host, move_to_host
from zinfer.kv_offload.space import LARGEST_BLOCK, PAGE, Space
from zinfer.parts import Account
from zinfer.timeline.recorder import Recorder

CACHE = "past_key_values"


class CachesOnHost:
    """The key-value caches of one model, in what its budget of host memory leaves beside the weights.

    Those that may have to leave the device count as well, beyond the part that is kept for caches.

    A cache goes there when a pass is to fill it that nobody gave one, or that has generate()'s own. One that the
    caller made stays as it is. Any thread may call any method; each cache belongs to one thread at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        device: AttachedDevice,
        host: Account,
        itemsize: int,
        recorder: Recorder | None,
    ) -> None:
        processor = device.processor
        page_lock: Literal["auto", "off"] = "auto" if processor.page_locks else "off"
        self._weights = (
            host.residents + host.window + host.conversions + host.small + host.bounce + host.experts
        )
        self._ceiling = host.ceiling
        self._space = Space(
            host.ceiling - self._weights - device.spare_bytes,
            page_lock=page_lock,
            current=processor.current,
            page_locks=device.page_locks,
        )
        self._processor = processor
        self._recorder = recorder
        self._config: Any = model.config
        self._itemsize = itemsize
        self._position = list(inspect.signature(model.forward).parameters).index(CACHE)
        self._generating = threading.local()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that caches hold."""
        return self._space.in_use

    @contextmanager
    def generating(self, given: Any) -> Iterator[None]:
        """Around a call of generate(), on whose thread an empty cache is its own unless it was `given` one."""
        before = getattr(self._generating, "own", False)
        self._generating.own = given is None
        try:
            yield
        finally:
            self._generating.own = before

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments for a pass with these arguments.

        Raises BudgetError, before anything is read, where its cache does not fit the host's memory.
        """
        cache: Any = kwargs.get(CACHE)
        if cache is None and len(args) <= self._position and self._makes_cache(kwargs):
            cache = DynamicCache(config=self._config)
            self._move(cache)
        elif self.takes(cache):
            self._move(cache)
        if layers_on_host(cache):
            self._refuse_excess(cache, Pass.of(kwargs, args))
            return {**kwargs, CACHE: cache}
        return dict(kwargs)

    def takes(self, cache: Any) -> bool:
        """Whether the next pass of this thread puts `cache` into host memory: generate()'s own, while it is empty."""
        return bool(getattr(self._generating, "own", False) and is_empty(cache))

    def close(self) -> None:
        """Wait for all copies, and give the memory back as soon as no cache holds it. Idempotent."""
        self._space.close()

    def _makes_cache(self, kwargs: Mapping[str, Any]) -> bool:
        asked = kwargs.get("use_cache")
        return bool(
            getattr(self._config.get_text_config(decoder=True), "use_cache", True) if asked is None else asked
        )

    def _move(self, cache: Cache) -> None:
        layers = self._config.get_text_config(decoder=True).num_hidden_layers
        move_to_host(cache, Lane(self._processor, self._space, self._recorder), layers)

    def _refuse_excess(self, cache: Cache, coming: Pass | None) -> None:
        if coming is None:
            return
        foreseen = cache_growth(cache, self._config, self._itemsize, coming)
        layers = layers_on_host(cache)
        first = foreseen.nbytes // max(
            1, foreseen.layers * coming.tokens
        )  # bytes of a position before there is one
        growth = sum(layer.growth(coming.tokens) * (layer.positions.width or first) for layer in layers)
        rounding = 2 * PAGE * (len(layers) + 2 * growth // LARGEST_BLOCK)
        more = growth + rounding - sum(layer.positions.spare_bytes for layer in layers)
        if not foreseen.sure or self._space.in_use + more <= self._space.limit:
            return
        gc.collect()  # caches may sit in reference cycles
        self._space.settle()
        used = self._space.in_use
        if used + more <= self._space.limit:
            return
        needed = used + more
        fit = coming.rows * max(0, self._space.limit - used - rounding) // max(growth, 1)
        # A quarter of the budget is kept for caches, or all that weights leave, if that is less.
        smallest = max(CACHE_SHARE * needed, self._weights + needed)
        smallest += bounce_bytes(2 * smallest)
        what = f"at most {fit} of its {coming.rows} sequences fit" if fit else "not even one sequence fits"
        raise BudgetError(
            f"this pass needs {needed} bytes of key-value caches in host memory, but the host's budget of "
            f"{self._ceiling} bytes leaves them {self._space.limit}: {what}; raise max_memory['cpu'] to {smallest}, or "
            "make batch or context smaller",
            smallest,
        )
