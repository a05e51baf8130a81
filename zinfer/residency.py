"""Who is resident while key-value caches grow and shrink: the ceiling holds for weights and caches together."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from zinfer.errors import BudgetError
from zinfer.kv_cache import Pass, activation_bytes, cache_bytes, cache_growth
from zinfer.planner.placement import Placement, grown, place, smallest, thinned
from zinfer.streaming import Streaming

logger = logging.getLogger("zinfer")

SPARE_BYTES = 64 << 20  # left when residents come back, so that they need not leave at the next token
SPARE_SHARE = 32  # ... or this part of the ceiling, if that is less


class Residency:
    """Turns residents back to streaming where a forward pass needs their memory, and lets them return afterwards.

    Two limits hold. The ceiling (max_memory) is for weights and key-value caches; what the machine had free at the
    start is for those and for activations too, which are estimated, not refused. Usually some residents leave or
    return; where that is not enough, window and residents are planned anew. Any thread may call any method.
    """

    def __init__(self, model: nn.Module, streaming: Streaming) -> None:
        self._config = getattr(model, "config", None)
        self._generates = bool(hasattr(model, "can_generate") and model.can_generate())  # type: ignore[operator]
        self._streaming = streaming
        self._first = self._placement = streaming.placement
        self._residents = self._first.residents
        self._itemsize = max((weight.dtype.itemsize for weight in streaming.weights), default=4)
        self._lock = threading.RLock()
        self._caches: dict[int, tuple[weakref.ref[Any], int]] = {}  # bytes of each cache that is alive
        self._warned = False

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value caches that are alive, as of their last pass."""
        with self._lock:
            return sum(count for alive, count in self._caches.values() if alive() is not None)

    @property
    def planned_bytes(self) -> int:
        """Bytes of the weights that are to be resident now."""
        return sum(self._streaming.footprints[index].resident for index in self._residents)

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Make room for a pass with these arguments.

        Raises BudgetError, before anything is read, where its key-value cache does not fit the ceiling with every
        weight streamed that can be.
        """
        coming = Pass.of(kwargs, args)
        if coming is None or self._config is None or not self._streaming.weights:
            return
        cache = kwargs.get("past_key_values")
        growth = cache_growth(cache, self._config, self._itemsize, coming) if self._caching(kwargs) else 0
        activations = activation_bytes(self._config, self._itemsize, coming)
        with self._lock:
            self._note(cache)
            self._make_room(self.cache_bytes + growth, activations, coming)

    def _caching(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a pass with these arguments makes or extends a cache."""
        asked = kwargs.get("use_cache")
        return self._generates and bool(getattr(self._config, "use_cache", True) if asked is None else asked)

    def after(self, output: Any) -> None:
        """Count the cache that a pass returned."""
        with self._lock:
            self._note(getattr(output, "past_key_values", None))

    def _note(self, cache: Any) -> None:
        for key in [key for key, (alive, _) in self._caches.items() if alive() is None]:
            del self._caches[key]
        if cache is not None and not isinstance(cache, (tuple, list, dict)):
            self._caches[id(cache)] = weakref.ref(cache), cache_bytes(cache)

    def _make_room(self, caches: int, activations: int, coming: Pass) -> None:
        account = self._streaming.account
        other = account.small + account.bounce + caches
        within_ceiling, within_machine = account.ceiling - other, account.free - other - activations
        fixed = self._placement.window_bytes + self._placement.transient_bytes
        within = min(within_ceiling, within_machine)
        stay = self._thinned(within - fixed)
        if stay is None and within < smallest(self._streaming.footprints) <= within_ceiling:
            self._warn(coming, account.free - within_machine)
            within = smallest(self._streaming.footprints)
            stay = self._thinned(within - fixed)
        if stay is None:
            self._plan_anew(within, caches, coming)
            return
        spare = min(SPARE_BYTES, account.ceiling // SPARE_SHARE)
        if stay == self._residents and within - fixed - self.planned_bytes >= 2 * spare:
            stay = self._returning(within - fixed, spare)
        if stay != self._residents:
            self._keep(stay)

    def _thinned(self, limit: int) -> frozenset[int] | None:
        return thinned(self._streaming.footprints, self._residents, self._placement.window_bytes, limit)

    def _returning(self, room: int, spare: int) -> frozenset[int]:
        """The residents when those that left come back, as far as `room` bytes allow."""
        footprints = self._streaming.footprints
        if self._placement is not self._first:
            if room + self._placement.window_bytes >= self._first.resident_bytes + self._first.window_bytes:
                self._divide(self._first)
            return self._residents
        wanted = self._first.residents
        whole = sum(footprints[index].resident for index in wanted)
        return wanted if whole <= room else grown(footprints, self._residents, wanted, room - spare)

    def _keep(self, stay: frozenset[int]) -> None:
        leave, join = self._residents - stay, stay - self._residents
        logger.debug("residents: %d leave, %d return", len(leave), len(join))
        weights = self._streaming.weights
        self._streaming.coordinator.change_residents(
            [weights[index] for index in leave], [weights[index] for index in join], self._streaming.unsettle
        )
        self._residents = stay
        self._streaming.account = replace(self._streaming.account, residents=self.planned_bytes)

    def _plan_anew(self, available: int, caches: int, coming: Pass) -> None:
        footprints, account = self._streaming.footprints, self._streaming.account
        needed = smallest(footprints)
        if needed > available:
            fit = coming.rows * max(0, available + caches - needed) // max(caches, 1)
            what = (
                f"at most {fit} of its {coming.rows} sequences fit" if fit else "not even one sequence fits"
            )
            raise BudgetError(
                f"this pass needs {caches} bytes of key-value cache, but the budget of {account.ceiling} bytes leaves "
                f"{max(0, available + caches - needed)} with as few weights in memory as possible: {what}; raise "
                f"max_memory['cpu'] to {account.ceiling + needed - available}, or make batch or context smaller",
                account.ceiling + needed - available,
            )
        self._divide(place(footprints, available))

    def _divide(self, placement: Placement) -> None:
        """Give all memory back and divide it as `placement` says; every resident is read again at its next use."""
        logger.debug(
            "memory divided anew: window %d, residents %d", placement.window_bytes, placement.resident_bytes
        )
        weights, coordinator = self._streaming.weights, self._streaming.coordinator
        leave = [weights[index] for index in self._residents]
        join = [weights[index] for index in sorted(placement.residents)]
        kept = [weight for weight in join if weight.placed is not None]
        coordinator.renew_memory(leave, self._streaming.unsettle, kept, placement.window_bytes)
        coordinator.change_residents((), join, self._streaming.unsettle)
        self._placement, self._residents = placement, placement.residents
        self._streaming.account = replace(
            self._streaming.account,
            residents=placement.resident_bytes,
            window=placement.window_bytes,
            conversions=placement.transient_bytes,
        )

    def _warn(self, coming: Pass, needed: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "a pass of %d x %d tokens may take %.2f GiB besides the weights, more than the machine has free: make "
                "batch or prompt smaller, or lower max_memory['cpu']",
                coming.rows,
                coming.tokens,
                needed / 2**30,
            )
