"""Which experts a cache should give up: policies compared on routings that were recorded from synthetic models.

    python -m benchmarks.evictions

Mixtures of experts are synthesised with each router skew, read a text, and the experts of every token and layer are
written down. Then each policy keeps a cache of each size as that routing goes by; "the future known" (Belady's) is
what no policy can beat. No times are measured: the figures are counts, and the same on every machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Requirement, Result, conclude, main_of, table
from zinfer.experts.eviction import HALF_LIFE, Uses

ROOT = Path(__file__).parents[1]
TEXT = ("README.md", "docs/design.md")  # what the models read, byte by byte
SKEWS = ("none", "mild", "strong")
ROWS = (1, 8)  # sequences that decode together: each reads on from a place of its own
SHARES = (0.05, 0.1, 0.2, 0.4, 0.7)  # of all experts, what a cache holds
CONFIG: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 12,
}
CONFIG |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512}
CONFIG |= {"num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 8192}
NEAR = 0.01  # the policy in use may trail the best of the others by this hit rate, the mean over all

Visit = tuple[int, frozenset[int]]  # a layer's position, and the numbers of the experts that are picked


class Policy(ABC):
    """Told of every visit; says which of those in the cache go first."""

    @abstractmethod
    def visited(self, visit: Visit) -> None:
        """Its layer runs."""

    @abstractmethod
    def latest(self, numbers: np.ndarray, layer: int) -> list[int]:
        """`numbers`, those to evict first at the front, while `layer` runs."""


class LeastRecent(Policy):
    """LRU."""

    def __init__(self, experts: int) -> None:
        self._last, self._clock = np.full(experts, -1), 0

    def visited(self, visit: Visit) -> None:
        """As Policy."""
        self._clock += 1
        self._last[list(visit[1])] = self._clock

    def latest(self, numbers: np.ndarray, layer: int) -> list[int]:
        """As Policy."""
        return [int(n) for n in numbers[np.argsort(self._last[numbers], kind="stable")]]


class LeastFrequent(Policy):
    """LFU over all that was seen, or, with `half_life`, a mix with LRU: uses count the less the older they are."""

    def __init__(self, experts: int, half_life: float, layers: int) -> None:
        self._count, self._keep = np.zeros(experts), 0.5 ** (1 / (half_life * layers))

    def visited(self, visit: Visit) -> None:
        """As Policy."""
        self._count *= self._keep
        self._count[list(visit[1])] += 1

    def latest(self, numbers: np.ndarray, layer: int) -> list[int]:
        """As Policy."""
        return [int(n) for n in numbers[np.argsort(self._count[numbers], kind="stable")]]


class NextUse(Policy):
    """zinfer's: see zinfer/experts/eviction.py."""

    def __init__(self, counts: Sequence[int], half_life: float) -> None:
        self._uses = Uses(counts, half_life)

    def visited(self, visit: Visit) -> None:
        """As Policy."""
        self._uses.visited(visit[0], sorted(visit[1]))

    def latest(self, numbers: np.ndarray, layer: int) -> list[int]:
        """As Policy."""
        return self._uses.latest(numbers, layer)


class FutureKnown(Policy):
    """Belady's: who is used last goes first."""

    def __init__(self, visits: Sequence[Visit], experts: int) -> None:
        self._times: list[list[int]] = [[] for _ in range(experts)]
        for time, (_, picked) in enumerate(visits):
            for number in picked:
                self._times[number].append(time)
        self._clock = -1

    def visited(self, visit: Visit) -> None:
        """As Policy."""
        self._clock += 1

    def latest(self, numbers: np.ndarray, layer: int) -> list[int]:
        """As Policy."""

        def following(number: int) -> float:
            times = self._times[number]
            at = bisect_right(times, self._clock)
            return times[at] if at < len(times) else inf

        return sorted((int(n) for n in numbers), key=following, reverse=True)


@dataclass(frozen=True)
class Routing:
    """A recorded one: `picked[token][layer]` are indices of experts."""

    picked: np.ndarray  # (tokens, layers, k)
    experts: int

    @property
    def layers(self) -> int:
        """Layers of experts."""
        return int(self.picked.shape[1])

    def visits(self, rows: int) -> list[Visit]:
        """`rows` sequences that decode together, each from a place of its own in the text."""
        tokens = len(self.picked) // rows
        return [
            (
                layer,
                frozenset(
                    int(index) + layer * self.experts
                    for row in range(rows)
                    for index in self.picked[row * tokens + step, layer]
                ),
            )
            for step in range(tokens)
            for layer in range(self.layers)
        ]

    @property
    def top_share(self) -> float:
        """Of all picks, those of the tenth of each layer's experts that are picked most."""
        top = max(1, self.experts // 10)
        counts = [
            np.bincount(self.picked[:, layer].ravel(), minlength=self.experts) for layer in range(self.layers)
        ]
        return float(np.mean([np.sort(count)[-top:].sum() / count.sum() for count in counts]))


def record(skew: str, tokens: int) -> Routing:
    """What a synthetic model with that router skew picks as it reads TEXT."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from zinfer.synth import synthesise

    config = Qwen3MoeConfig(**CONFIG)
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in TEXT).encode()
    found: list[list[torch.Tensor]] = []
    with tempfile.TemporaryDirectory(prefix="zinfer-evictions-") as folder:
        path = os.path.join(folder, "model")
        synthesise(config, path, dtype="float32", router_skew=skew, progress=False)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        for module in (part for part in model.modules() if type(part).__name__.endswith("Experts")):
            mine: list[torch.Tensor] = []
            found.append(mine)
            module.register_forward_pre_hook(lambda _, inputs, mine=mine: mine.append(inputs[1].clone()))
        ids = torch.tensor([list(text[:tokens])])
        with torch.no_grad():
            model(ids)
    return Routing(torch.stack([torch.cat(layer) for layer in found], dim=1).numpy(), config.num_experts)


def hit_rate(visits: Sequence[Visit], policy: Policy, slots: int) -> float:
    """Of all picks but those of the first visits, which fill the cache, the share that was there."""
    cached: set[int] = set()
    hits = picks = 0
    for time, (layer, picked) in enumerate(visits):
        policy.visited((layer, picked))
        if time >= len(visits) // 4:
            hits += len(picked & cached)
            picks += len(picked)
        cached |= picked
        over = len(cached) - max(slots, len(picked))
        if over > 0:
            idle = np.array(sorted(cached - picked), dtype=np.intp)
            cached.difference_update(policy.latest(idle, layer)[:over])
    return hits / picks


def policies(routing: Routing, visits: Sequence[Visit]) -> Iterator[tuple[str, Callable[[], Policy]]]:
    """Name and maker of each."""
    layers, each = routing.layers, [routing.experts] * routing.layers
    total = sum(each)
    yield "LRU", lambda: LeastRecent(total)
    yield "LFU", lambda: LeastFrequent(total, 1e9, layers)
    for half_life in (8.0, 32.0, 128.0):
        yield f"mix of both, half-life {half_life:.0f}", lambda h=half_life: LeastFrequent(total, h, layers)  # type: ignore[misc]
    for half_life in (8.0, 32.0, 128.0):
        yield f"next use, half-life {half_life:.0f}", lambda h=half_life: NextUse(each, h)  # type: ignore[misc]
    yield "the future known", lambda: FutureKnown(visits, total)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evictions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, default=800, help="of the text that is read")
    parser.add_argument(
        "--json", help="file to write; default: in benchmarks/results, named after the machine"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; 0 when the policy in use is as good as the best of the others."""
    options = _parse(arguments)
    rates: dict[str, list[float]] = {}
    kept: list[dict[str, Any]] = []
    columns: list[str] = []
    for skew in SKEWS:
        routing = record(skew, options.tokens)
        sys.stderr.write(
            f"{skew}: a tenth of the experts gets {100 * routing.top_share:.0f} % of the picks\n"
        )
        for rows in ROWS:
            visits = routing.visits(rows)
            for name, make in policies(routing, visits):
                found = {
                    share: hit_rate(visits, make(), round(share * routing.experts * routing.layers))
                    for share in SHARES
                }
                rates.setdefault(name, []).extend(found.values())
                kept.append(
                    {"skew": skew, "rows": rows, "policy": name, "top": routing.top_share, "hit": found}
                )
            columns += [f"{skew}, batch {rows}, {share:.0%}" for share in SHARES]
    mean = {name: sum(values) / len(values) for name, values in rates.items()}
    mine = f"next use, half-life {HALF_LIFE:.0f}"
    others = [value for name, value in mean.items() if not name.startswith(("next use", "the future"))]
    lines = [
        [name, f"{100 * mean[name]:.1f}", *(f"{100 * value:.0f}" for value in values)]
        for name, values in rates.items()
    ]
    body = (
        f"Share of picked experts, in %, that a cache of 5 to 70 % of all experts held; {options.tokens} bytes of "
        "text, the first quarter uncounted. Router skew, sequences that decode together, size of the cache:\n\n"
        f"{table(['policy', 'mean', *columns], lines)}"
    )
    result = Result(
        name="evictions",
        drive=None,
        settings={"tokens": options.tokens, "config": CONFIG, "text": list(TEXT)},
        rounds=kept,
        figures=mean,
        requirements=[
            Requirement(
                "hit rate of the policy in use, less the best of LRU, LFU and mixes",
                mean[mine] - max(others),
                -NEAR,
                True,
            )
        ],
        body=body,
        load_average=os.getloadavg()[0],
    )
    return conclude(result, "benchmarks.evictions", arguments, options.json)


if __name__ == "__main__":
    main_of(main)
