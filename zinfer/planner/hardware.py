"""A machine in numbers: what the planner knows of drive, memories, PCIe and arithmetic, and where each number is from.

Plain data and its validation. The profiles that ship with zinfer lie in `profiles/`, one JSON object each; a file
of a user's has the same fields. Measuring the machine at hand is hardware_probe.py's work.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zinfer.errors import OptionError
from zinfer.wording import brief

PROFILES = Path(__file__).parent / "profiles"

# Field -> (least, most, unit). Outside lies a slip of the pen (GB for bytes, bits for bytes), not a machine.
RANGES: dict[str, tuple[float, float, str]] = {
    "drive_read": (1e6, 1e12, "bytes a second"),
    "host_memory": (64 << 20, 1 << 50, "bytes"),
    "host_bandwidth": (1e8, 1e14, "bytes a second"),
    "device_memory": (64 << 20, 1 << 45, "bytes, or 0 for a machine that computes on the CPU"),
    "device_bandwidth": (1e9, 1e15, "bytes a second, or 0 without a device"),
    "host_to_device": (1e8, 1e13, "bytes a second, or 0 without a device"),
    "efficiency": (0.01, 1.0, "(a share of the matmul rates)"),
    "copy_bandwidth": (1e8, 1e15, "bytes a second, read and written"),
    "attention_bandwidth": (1e8, 1e15, "bytes a second of keys and values"),
    "operator_seconds": (0.0, 1e-3, "seconds"),
}
OPTIONAL = ("efficiency", "copy_bandwidth", "attention_bandwidth", "operator_seconds")
WITHOUT_DEVICE = ("device_memory", "device_bandwidth", "host_to_device")
FLOPS_RANGE = (1e6, 1e18)  # flop a second
ROWS_RANGE = (1, 1 << 24)
DTYPES = ("bfloat16", "float16", "float32")

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Hardware:
    """One machine. Rates in bytes or flop a second, memories in bytes; `sources` says where each number is from.

    `device_memory` is 0 where the CPU computes. `matmul` maps a dtype to points (rows M, flop/s) of the product of an
    M-row matrix with a weight, M rising: several where it was measured, the peak alone where it was published, to be
    multiplied by `efficiency`, the share of it that large products reach. `copy_bandwidth` is that of operators which
    only move bytes, the memory for their results included, `attention_bandwidth` that of fused attention over a
    cache; None: the memory's. `operator_seconds`: what starting an operator costs, Python's share included.
    """

    name: str
    drive_read: float
    host_memory: int
    host_bandwidth: float
    device_memory: int
    device_bandwidth: float
    host_to_device: float
    matmul: Mapping[str, Curve]
    efficiency: float = 1.0
    copy_bandwidth: float | None = None
    attention_bandwidth: float | None = None
    operator_seconds: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_device(self) -> bool:
        """Whether a GPU computes."""
        return self.device_memory > 0

    def bandwidth(self, kind: str) -> float:
        """Bytes a second that operators of a kind ("matmul", "attention" or "copy") move at most."""
        memory = self.device_bandwidth if self.has_device else self.host_bandwidth
        return {"attention": self.attention_bandwidth, "copy": self.copy_bandwidth}.get(kind) or memory

    def flop_rate(self, dtype: str, rows: float) -> float:
        """Flop a second of a product with `rows` rows: log-log between points, level beyond the last.

        Below the first point time is that of the first: fewer rows read the same weight. A dtype without a curve
        computes as float32, that without one as any there is.
        """
        curve = self.matmul.get(dtype) or self.matmul.get("float32") or next(iter(self.matmul.values()))
        position = bisect_left([point[0] for point in curve], rows)
        if len(curve) == 1 or position == len(curve):
            rate = curve[-1][1]
        elif position == 0:
            rate = curve[0][1] * rows / curve[0][0]
        else:
            (low, slow), (high, fast) = curve[position - 1], curve[position]
            share = math.log(rows / low) / math.log(high / low)
            rate = math.exp(math.log(slow) + share * (math.log(fast) - math.log(slow)))
        return rate * self.efficiency

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a profile file has them."""
        fields = asdict(self)
        fields["matmul"] = {dtype: [list(point) for point in curve] for dtype, curve in self.matmul.items()}
        fields["sources"] = dict(self.sources)
        return fields


def published_names() -> tuple[str, ...]:
    """The machines whose profiles ship with zinfer."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.json")))


def load_hardware(name: str) -> Hardware:
    """The shipped profile called `name`, or that in the file `name`. Raises OptionError naming the field at fault."""
    shipped = PROFILES / f"{name}.json"
    path = str(shipped) if name in published_names() else name
    if os.path.isdir(path):
        raise OptionError(
            f"hardware {brief(name)} is a directory; give a JSON file, 'this', or one of {', '.join(published_names())}"
        )
    if not os.path.isfile(path):
        raise OptionError(
            f"hardware {brief(name)}: no such file, and no profile of that name; the profiles are "
            f"{', '.join(published_names())}, and 'this' measures the machine at hand"
        )
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"hardware file {path}: not readable as JSON ({error})") from error
    return hardware_from(document, f"hardware file {path}")


def hardware_from(document: Any, origin: str) -> Hardware:
    """The Hardware that the JSON value `document` describes; `origin` names it in errors.

    Raises OptionError for a field that is missing, unknown, of the wrong type or absurd, with the plausible range.
    """
    if not isinstance(document, dict):
        raise OptionError(f"{origin}: not a JSON object with fields such as {', '.join(RANGES)}")
    known = {"name", "matmul", "sources", *RANGES}
    if unknown := sorted(map(str, set(document) - known)):
        raise OptionError(
            f"{origin}: unknown field {brief(unknown[0])}; the fields are {', '.join(sorted(known))}"
        )
    # A measured machine's own record says null where nothing was measured.
    left_out = {name for name in OPTIONAL if document.get(name) is None}
    values = {name: _number(document, name, origin) for name in RANGES if name not in left_out}
    present = [name for name in WITHOUT_DEVICE if values[name]]
    if present and len(present) < len(WITHOUT_DEVICE):
        absent = next(name for name in WITHOUT_DEVICE if not values[name])
        raise OptionError(
            f"{origin}: {absent} is 0 but {present[0]} is not; a device has all three, a CPU none"
        )
    name, sources = document.get("name"), document.get("sources", {})
    if not isinstance(name, str) or not name.strip():
        raise OptionError(f"{origin}: field 'name' is {brief(name)}; it is a text such as 'my workstation'")
    if not isinstance(sources, dict) or not all(isinstance(text, str) for text in sources.values()):
        raise OptionError(f"{origin}: field 'sources' maps names of fields to texts")
    return Hardware(
        name=name,
        matmul=_curves(document.get("matmul"), origin),
        host_memory=int(values.pop("host_memory")),
        device_memory=int(values.pop("device_memory")),
        sources=sources,
        **values,
    )


def _number(document: dict[str, Any], name: str, origin: str) -> Any:
    least, most, unit = RANGES[name]
    span = f"plausible is {least:g} to {most:g} {unit}"
    if name not in document:
        raise OptionError(f"{origin}: field {name!r} is missing; {span}")
    value = document[name]
    zero_says_none = name in WITHOUT_DEVICE and type(value) in (int, float) and value == 0
    if zero_says_none or _between(value, least, most):
        return value
    raise OptionError(f"{origin}: field {name!r} is {brief(value)}; {span}")


def _between(value: Any, least: float, most: float) -> bool:
    """Whether `value` is a number in that range; NaN is in none, and True is no number."""
    return type(value) in (int, float) and least <= value <= most


def _curves(value: Any, origin: str) -> dict[str, Curve]:
    where = f"{origin}: field 'matmul'"
    shape = 'it maps dtypes to points, such as {"bfloat16": [[1, 2e10], [512, 9e11]]}'
    if not isinstance(value, dict) or not value:
        raise OptionError(f"{where} is {'missing' if value is None else brief(value)}; {shape}")
    curves: dict[str, Curve] = {}
    for dtype, points in value.items():
        if dtype not in DTYPES:
            raise OptionError(f"{where} has a dtype {brief(dtype)}; the dtypes are {', '.join(DTYPES)}")
        if not isinstance(points, list) or not points:
            raise OptionError(f"{where}, {dtype}: {brief(points)} is no list of points; {shape}")
        for point in points:
            if not (
                isinstance(point, list)
                and len(point) == 2
                and type(point[0]) is int
                and _between(point[0], *ROWS_RANGE)
                and _between(point[1], *FLOPS_RANGE)
            ):
                raise OptionError(
                    f"{where}, {dtype}: {brief(point)} is no point [rows, flop/s]; plausible are {ROWS_RANGE[0]} to "
                    f"{ROWS_RANGE[1]} rows and {FLOPS_RANGE[0]:g} to {FLOPS_RANGE[1]:g} flop a second"
                )
        rows = [point[0] for point in points]
        if rows != sorted(set(rows)):
            raise OptionError(f"{where}, {dtype}: the rows {brief(rows)} do not rise from point to point")
        curves[dtype] = tuple((point[0], float(point[1])) for point in points)
    return curves


def checked_hardware(hardware: Hardware) -> Hardware:
    """`hardware`, which a program made, held against what is asked of a file. Raises OptionError naming the field."""
    try:
        fields = hardware.as_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise OptionError(
            f"hardware: a Hardware whose 'matmul' or 'sources' is no mapping as its docstring has it ({error})"
        ) from error
    return hardware_from(fields, "hardware")
