"""Who is resident while key-value caches grow and shrink: the ceiling holds for weights and caches together."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from zinfer.errors import BudgetError
from zinfer.kv_cache import (
    Pass,
    activation_bytes,
    cache_bytes,
    cache_growth,
    cache_length,
    caches_of,
    growth_where_computed,
)
from zinfer.planner.memory import free_memory
from zinfer.planner.placement import Placement, grown, place, smallest, streams_through, thinned
from zinfer.streaming import Streaming

logger = logging.getLogger("zinfer")

SPARE_BYTES = 64 << 20  # left when residents come back, so that they need not leave at the next token
SPARE_SHARE = 32  # ... or this part of the ceiling, if that is less
PATIENCE = 5.0  # seconds to wait for a moment in which no operator runs with a weight of the window
SHORT_PATIENCE = 0.5  # the same where memory ran out in an operator, and residents can leave instead
UNSAID_SHARE = 16  # where torch does not say how much was missing, this part of the ceiling is taken for it
CALM_PASSES = (
    256  # passes without a shortage before missing memory is looked for again; twice that after each one
)
BETWEEN = 0.001  # seconds between two looks


@dataclass(frozen=True)
class Given:
    """What was given back where memory ran out, in bytes: of the window, and of residents or experts."""

    window: int
    residents: int


class Residency:
    """Turns residents back to streaming where a forward pass needs their memory, and lets them return afterwards.

    Two limits hold as far as a pass can be foreseen. The ceiling (max_memory) is for weights and key-value caches;
    what the machine had free at the start is for those and for activations too, which are estimated, not refused.
    Usually some residents leave or return. Where that is not enough, memory is divided anew, once: with a window
    that can stream what has to leave, and with places for all that can return later. It also is before the first pass,
    if as many sequences as that one has are better served by another window.

    Memory may run out even so: an estimate was wrong, or another process has taken it. Then some is given back at once,
    and what is missing of the budget counts as lost, so that later passes plan without it. It is looked for again after
    many passes without a shortage, while no cache is alive.

    Any thread may call any method. One lock guards it; a thread that holds it takes the coordinator's, never the
    other way round.
    """

    def __init__(self, model: nn.Module, streaming: Streaming) -> None:
        self._config = getattr(model, "config", None)
        # Whether passes make caches: what generates does, another model may; the first pass tells.
        self._caching: bool | None = None
        if hasattr(model, "can_generate") and model.can_generate():  # type: ignore[operator]
            self._caching = True
        dtype = getattr(model, "dtype", None)
        widest = max((weight.dtype.itemsize for weight in streaming.weights), default=4)
        self._itemsize = getattr(dtype, "itemsize", widest)
        self._streaming = streaming
        self._placement = streaming.placement  # its residents are all that have a place
        self._rows = 1  # sequences of a pass that memory was divided for
        self._divided = True  # False while memory is divided anew: an interrupt may leave it at any point
        self._lock = threading.RLock()
        self._caches: dict[int, tuple[weakref.ref[Any], int]] = {}  # bytes of each cache that is alive
        # Growth of caches and activations of each thread's pass. One that an error ended counts until that thread's
        # next, or until the thread has ended.
        self._coming: weakref.WeakKeyDictionary[threading.Thread, tuple[int, int]] = (
            weakref.WeakKeyDictionary()
        )
        self._warned = False
        self._lost = 0  # bytes of the budget that turned out not to be there
        self._missed = (
            0  # bytes of the largest request that failed: these stay free when more is found to be there
        )
        self._calm, self._patience = 0, CALM_PASSES  # passes since the last shortage, and how many have to be
        self._refused = 0  # of the device's refused_bytes, those that count as lost already

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value caches that are alive, as of their last pass."""
        with self._lock:
            return sum(count for alive, count in self._caches.values() if alive() is not None)

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Make room for a pass with these arguments.

        Raises BudgetError, before anything is read, where its key-value cache does not fit the ceiling with every
        weight streamed that can be.
        """
        coming = Pass.of(kwargs, args)
        if coming is None or self._config is None or not self._streaming.weights:
            return
        caches = caches_of(kwargs)
        growth, sure = 0, True
        if self._makes_cache(kwargs):
            foreseen = cache_growth(caches[0] if caches else None, self._config, self._itemsize, coming)
            growth = growth_where_computed(caches[0] if caches else None, foreseen)
            sure = foreseen.sure and self._caching is True
        past = cache_length(caches[0]) if caches else 0
        activations = activation_bytes(self._config, self._itemsize, coming, past)
        me = threading.current_thread()
        with self._lock:
            self._count(caches, again=False)
            self._coming[me] = (growth, activations)
            self._keep_track()
            try:
                self._make_room(coming, sure)
            except BaseException:
                del self._coming[me]
                raise

    def after(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """Count the cache that a pass returned."""
        returned = caches_of(output) if isinstance(output, Mapping) else []
        with self._lock:
            self._coming.pop(threading.current_thread(), None)
            self._count([*caches_of(kwargs), *returned], again=True)
            if isinstance(output, Mapping) and self._makes_cache(kwargs):
                self._caching = bool(returned)

    @property
    def lost_bytes(self) -> int:
        """Bytes of the budget that turned out not to be there, and are planned without."""
        with self._lock:
            return self._lost

    def relieve(self, asked: int | None, *, ended: bool) -> Given:
        """Give `asked` bytes back and some more, if weights can: that many could not be had. None: not known how many.

        `ended`: the calling thread's pass has. Residents that are there leave first; where that is not enough, memory
        is divided anew, with another window, as soon as nobody uses it. Raises ClosedError, and OutOfMemoryError
        where not even the smallest window can be had: the next pass looks for one again.
        """
        with self._lock:
            if ended:
                self._coming.pop(threading.current_thread(), None)
            weights, footprints = self._streaming.weights, self._streaming.footprints
            if not weights:
                return Given(0, 0)
            ceiling = self._streaming.account.ceiling
            asked = ceiling // UNSAID_SHARE if asked is None else asked
            self._missed = min(max(self._missed, asked), ceiling)
            self._calm, self._patience = 0, 2 * self._patience
            residents = self._residents
            there = frozenset(index for index in residents if weights[index].resident is not None)
            window, fixed = self._placement.window_bytes, self._fixed
            before = self._streaming.account.window  # less than that where none could be had
            bound = frozenset(index for index in residents if not streams_through(window, footprints[index]))
            experts, used, least = self._streaming.experts, fixed + self._bytes(there), smallest(footprints)
            cached = experts.limit if experts is not None else 0
            self._lose(max(least + self._slot_bytes, used + cached - asked - self._spare))
            if experts is not None:
                experts.resize(cached - asked - self._spare)
                cached -= experts.limit
                if cached >= asked:
                    return Given(0, cached)
                asked -= cached
            target = max(least, used - asked - self._spare)
            stay = thinned(footprints, there | bound, window, target - fixed)
            if stay is not None and self._divided and not self._stranded:
                self._keep(residents, stay)
            # If somebody uses the window, all leave that it can stream.
            elif not self._divide_smaller(target, least):
                self._keep(residents, bound)
            left = frozenset(index for index in there if weights[index].resident is not None)
            given = max(0, before - self._streaming.account.window)
            return Given(given, self._bytes(there) - self._bytes(left) + cached)

    def _divide_smaller(self, target: int, least: int) -> bool:
        """Divide memory anew within `target` bytes, or within `least` where those cannot be had either."""
        footprints = self._streaming.footprints
        try:
            return self._divide(place(footprints, target, self._rows), SHORT_PATIENCE)
        except BudgetError:
            if target == least:
                raise
        return self._divide(place(footprints, least), SHORT_PATIENCE)

    def _lose(self, target: int) -> None:
        """From now on, plan as if no more than `target` bytes were left for weights."""
        self._lost = max(self._lost, min(self._limits()[:2]) - target)

    def _keep_track(self) -> None:
        """Before a pass: what residents were refused is lost; what was lost may be there again."""
        refused = self._streaming.coordinator.device.refused_bytes
        if refused > self._refused:
            self._missed, self._refused = max(self._missed, refused - self._refused), refused
            self._calm = 0
            self._lose(self._fixed + self._bytes(self._residents))
        self._calm += 1
        if not self._lost or self._calm < self._patience or self.cache_bytes or len(self._coming) > 1:
            return
        self._calm = 0
        allowed = min(self._limits()[:2]) - self._lost
        planned = max(0, allowed - self._fixed - self._bytes(self._residents))
        there = self._streaming.coordinator.device.free_memory()
        free = free_memory() if there is None else there
        found = min(self._lost, free - self._missed - planned)
        if found > 0:
            self._lost -= found
            logger.info("%d bytes that were missing can be had again", found)

    def _makes_cache(self, kwargs: Mapping[str, Any]) -> bool:
        asked = kwargs.get("use_cache")
        wanted = getattr(self._config, "use_cache", True) if asked is None else asked
        return bool(wanted) and self._caching is not False

    def _count(self, caches: list[Any], *, again: bool) -> None:
        """Note the bytes of `caches`; of one that is known, only if `again`."""
        for key in [key for key, (alive, _) in self._caches.items() if alive() is None]:
            del self._caches[key]
        for cache in caches:
            known = self._caches.get(id(cache))
            if (again or known is None) and not isinstance(cache, (tuple, list, dict)):
                self._caches[id(cache)] = weakref.ref(cache), cache_bytes(cache)

    @property
    def _residents(self) -> frozenset[int]:
        """The weights that are to be resident now; kept by the weights themselves, so that it cannot be half true."""
        return frozenset(i for i, weight in enumerate(self._streaming.weights) if weight.wants_residence)

    @property
    def _stranded(self) -> bool:
        """Whether a weight is neither to be resident nor can stream through the window: a device had no room for it."""
        window = self._placement.window_bytes
        return any(
            not weight.wants_residence and not streams_through(window, footprint)
            for weight, footprint in zip(self._streaming.weights, self._streaming.footprints, strict=True)
        )

    def _bytes(self, indices: frozenset[int]) -> int:
        return sum(self._streaming.footprints[index].resident for index in indices)

    def _make_room(self, coming: Pass, sure: bool) -> None:
        account, footprints = self._streaming.account, self._streaming.footprints
        ceiling, machine, caches = self._limits()
        least = smallest(footprints)
        fewest = least + self._slot_bytes
        within = min(ceiling, machine)
        within = max(min(within, fewest), within - self._lost)  # what was lost is no reason to refuse a pass
        within -= self._experts_within(within)
        better = self._other_window(coming.rows, max(within, least))
        if self._divided and better is None and self._fits(within):
            return
        if within < least:
            if ceiling < fewest and sure:
                self._refuse(ceiling, fewest, caches, coming)
            self._warn(coming, account.free - machine, fewest)
            within = least
        residents, left = self._residents, within - self._fixed
        stay = thinned(footprints, residents, self._placement.window_bytes, left)
        broken = not self._divided or self._stranded
        if stay is None or broken or better is not None:
            # What was lost is no reason to wait: another pass will find a better moment.
            needed = self._lost == 0 or broken or min(ceiling, machine) < self._fixed
            patience = PATIENCE if needed or better is not None else 0.0
            if not self._divide(better or place(footprints, within, self._rows), patience):
                self._cannot_divide()
        elif stay != residents:
            self._keep(residents, stay)
        else:
            self._keep(residents, self._returning(residents, left, self._spare))

    @property
    def _slot_bytes(self) -> int:
        """Bytes of an expert that is read by itself: room for one there always is."""
        return self._streaming.experts.slot_bytes if self._streaming.experts is not None else 0

    def _experts_within(self, within: int) -> int:
        """Let experts have what other weights do not need of `within` bytes; what that is, or one expert's."""
        experts = self._streaming.experts
        if experts is None:
            return 0
        experts.resize(within - self._fixed - self._bytes(self._placement.residents))
        return experts.limit

    def _limits(self) -> tuple[int, int, int]:
        """Bytes left for weights by the ceiling, and by what the machine had free; bytes of all caches."""
        account = self._streaming.account
        caches = self.cache_bytes + sum(growth for growth, _ in self._coming.values())
        other = account.small + account.bounce + caches
        activations = sum(activations for _, activations in self._coming.values())
        return account.ceiling - other, account.free - other - activations, caches

    @property
    def _fixed(self) -> int:
        return self._placement.window_bytes + self._placement.transient_bytes

    @property
    def _spare(self) -> int:
        return min(SPARE_BYTES, self._streaming.account.ceiling // SPARE_SHARE)

    def _other_window(self, rows: int, within: int) -> Placement | None:
        """A placement for passes of `rows` sequences, if it has another window and nothing would be read twice.

        Only where a CPU computes: another device takes much more of them to compute longer than it copies.
        """
        other = self._streaming.host is not None
        if other or rows <= self._rows or len(self._coming) > 1 or self._streaming.loaded:
            return None
        self._rows = rows
        wanted = place(self._streaming.footprints, within, rows)
        return wanted if wanted.window_bytes != self._placement.window_bytes else None

    def _fits(self, within: int) -> bool:
        """Whether all is well as it is: residents fit, none could return, and the others stream through the window."""
        residents = self._residents
        room = within - self._fixed - self._bytes(residents)
        if room < 0 or self._stranded:
            return False
        return residents == self._placement.residents or room < 2 * self._spare

    def _returning(self, residents: frozenset[int], room: int, spare: int) -> frozenset[int]:
        """The residents when those that left come back, as far as `room` bytes for all of them allow."""
        everyone = self._placement.residents
        if self._bytes(everyone) <= room:
            return everyone
        return grown(self._streaming.footprints, residents, everyone, room - spare)

    def _keep(self, residents: frozenset[int], stay: frozenset[int]) -> None:
        leave, join = residents - stay, stay - residents
        if not leave and not join:
            return
        logger.debug("residents: %d leave, %d return", len(leave), len(join))
        weights = self._streaming.weights
        self._streaming.coordinator.change_residents(
            [weights[index] for index in sorted(leave)],
            [weights[index] for index in sorted(join)],
            self._streaming.unsettle,
        )
        self._streaming.account = replace(self._streaming.account, residents=self._bytes(stay))

    def _refuse(self, ceiling: int, least: int, caches: int, coming: Pass) -> None:
        account = self._streaming.account
        room = max(0, ceiling + caches - least)
        fit = coming.rows * room // max(caches, 1)
        what = f"at most {fit} of its {coming.rows} sequences fit" if fit else "not even one sequence fits"
        needed = account.given(account.ceiling + least - ceiling)
        raise BudgetError(
            f"this pass needs {caches} bytes of key-value cache, but the budget of {account.ceiling} bytes leaves "
            f"{room} with as few weights in memory as possible: {what}; raise {account.option} to {needed}, or make "
            "batch or context smaller",
            needed,
        )

    def _divide(self, now: Placement, patience: float = PATIENCE) -> bool:
        """Give all memory back and divide it anew: as in `now`, and with more residents when caches are gone.

        Every resident is read again at its next use. False, with nothing changed, where somebody uses the window for
        `patience` seconds.
        """
        streaming, footprints, account = self._streaming, self._streaming.footprints, self._streaming.account
        fixed = now.window_bytes + now.transient_bytes
        calm = account.ceiling - account.small - account.bounce - fixed - self._slot_bytes
        everyone = frozenset(
            i for i, footprint in enumerate(footprints) if not footprint.rows_only and not footprint.sliced
        )
        placement = replace(
            now, residents=grown(footprints, now.residents, everyone, max(calm, now.resident_bytes))
        )
        logger.debug("memory divided anew: window %d, residents %d", now.window_bytes, now.resident_bytes)
        weights = streaming.weights
        places = [
            weights[index] for index in sorted(placement.residents) if weights[index].placed is not None
        ]
        join = [weights[index] for index in sorted(now.residents)]
        leave = [weights[index] for index in sorted(self._residents)]
        deadline = time.monotonic() + patience
        before = self._divided
        self._divided = False
        try:
            while not streaming.coordinator.renew_memory(
                leave, join, places, now.window_bytes, streaming.unsettle
            ):
                if time.monotonic() > deadline:
                    self._divided = before
                    return False
                time.sleep(BETWEEN)
        except BaseException:
            # What there was may have been given back, and nothing come in its place.
            window = streaming.coordinator.device.window_bytes
            streaming.account = replace(
                account,
                residents=self._bytes(self._residents),
                window=window,
                conversions=account.conversions if window else 0,
            )
            raise
        self._placement, self._divided = (
            replace(placement, resident_bytes=self._bytes(placement.residents)),
            True,
        )
        streaming.account = replace(
            account, residents=now.resident_bytes, window=now.window_bytes, conversions=now.transient_bytes
        )
        return True

    def _cannot_divide(self) -> None:
        """Memory stays as it is, for tensors of the window are kept: an error where caches would break the ceiling."""
        account, held = self._streaming.account, self.cache_bytes
        growth = sum(growth for growth, _ in self._coming.values())
        used = (
            account.small
            + account.bounce
            + account.window
            + account.conversions
            + self._bytes(self._residents)
        )
        if used + held + growth > account.ceiling:
            raise BudgetError(
                f"a key-value cache of {held + growth} bytes needs another division of memory, but tensors of the "
                "window are in use by other threads or kept by the caller; call again when they are done, or raise "
                + account.option
            )

    def _warn(self, coming: Pass, needed: int, least: int) -> None:
        """Tell, once, that a pass may take `needed` bytes besides the `least` that weights do."""
        if self._warned:
            return
        self._warned = True
        account = self._streaming.account
        where, remedy = "the machine has free", f"lower {account.option}"
        if self._streaming.host is not None:  # what a device has free is its budget
            where = f"the budget on {self._streaming.coordinator.device.name} leaves"
            remedy = f"raise {account.option} to {account.given(needed + least)}"
        logger.warning(
            "a pass of %d x %d tokens may take %.2f GiB besides the weights, more than %s: make batch or prompt "
            "smaller, or %s",
            coming.rows,
            coming.tokens,
            needed / 2**30,
            where,
            remedy,
        )
