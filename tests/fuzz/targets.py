"""What is fuzzed: for each parser of files, the errors it may raise and what must hold when it raises none."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save

from zinfer.aio.block_device import BlockDevice
from zinfer.aio.profile import Profile, load_profile, profile_path, save_profile
from zinfer.errors import CheckpointError, OptionError, StoreError, ZinferError
from zinfer.store import verify
from zinfer.store.entry import MANIFEST, SCHEMA, Entry, FileRecord
from zinfer.store.part_file import hash_file
from zinfer.timeline import chrome
from zinfer.timeline.events import COMPUTE, READS, SWEEPS, WAITS, Span, Timeline, totals
from zinfer.weights.checkpoint import open_checkpoint
from zinfer.weights.packed import PAGE, Geometry, Header, format_page, read_pack
from zinfer.weights.safetensors_header import TensorEntry, read_header

from .mutate import BARE, Framing

LONGEST_MESSAGE = 10_000  # characters: a path of PATH_MAX, twice
DRIVE = BlockDevice("Fuzzed-S1", "nvme0n1")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Target:
    """`one_input` returns for each input that is handled as promised, and raises for every other."""

    one_input: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    framing: Framing = BARE


class Broken(AssertionError):
    """The parser took, or said, what it must not."""


def require(holds: bool, what: str) -> None:
    """Raises Broken; unlike `assert` it stands under -O too."""
    if not holds:
        raise Broken(what)


@functools.cache
def workspace() -> Path:
    """A folder in memory where possible, gone with the process."""
    ram = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    kept = tempfile.TemporaryDirectory(prefix="zinfer-fuzz-", dir=ram)
    workspace.kept = kept  # type: ignore[attr-defined]
    return Path(kept.name)


def place(name: str, data: bytes) -> Path:
    """`data` in the file `name` of the workspace."""
    path = workspace() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def check_message(error: ZinferError, *named: object) -> None:
    text = str(error)
    text.encode("utf-8", "backslashreplace")
    require(len(text) <= LONGEST_MESSAGE, f"a message of {len(text)} characters")
    require(any(str(name) in text for name in named), f"{text!r} names none of {named}")


class Formats(logging.Handler):
    """Formats what is logged: a record that cannot be is found out here, not on a user's terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage().encode()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send the library's log nowhere, but format it."""
    logger, handler = logging.getLogger("zinfer"), Formats()
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


# safetensors headers


def check_tensors(tensors: dict[str, TensorEntry], sizes: dict[str, int]) -> None:
    """Every tensor lies inside its file, in as many bytes as its dtype and shape need, and on no other."""
    for name, entry in tensors.items():
        require(entry.name == name, "the name")
        require(8 <= entry.offset <= entry.offset + entry.length <= sizes[entry.path], "inside the file")
        require(entry.length == prod(entry.shape) * entry.dtype.itemsize, "length, dtype and shape agree")
        torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    filled = sorted((entry.path, entry.offset, entry.length) for entry in tensors.values() if entry.length)
    for (path, offset, length), (other, after, _) in itertools.pairwise(filled):
        require(path != other or offset + length <= after, "no overlap")


def safetensors_header(data: bytes) -> None:
    path = str(place("header/model.safetensors", data))
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        return check_message(error, path)
    check_tensors(tensors, {path: len(data)})


def safetensors_seeds() -> list[bytes]:
    many = {f"layers.{i}.weight": torch.zeros(2, 3 + i, dtype=torch.bfloat16) for i in range(4)}
    one = {"a": torch.zeros(2), "empty": torch.zeros(0, 5), "scalar": torch.tensor(1)}
    return [save(many), save(one, metadata={"format": "pt"}), save({"t": torch.zeros(1, dtype=torch.bool)})]


def split_safetensors(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def join_safetensors(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


# The header page of a shard striped over several drives


def pack_files() -> list[Path]:
    return [workspace() / f"pack-{member}" / "model.safetensors" for member in range(2)]


def pack_members() -> list[bytes]:
    """A shard of two members, as a writer leaves it."""
    content = safetensors_seeds()[0]
    geometry = Geometry(2, PAGE, len(content))
    folders = tuple(str(path.parent) for path in pack_files())
    files = [bytearray(format_page(Header("0" * 32, member, geometry, folders))) for member in range(2)]
    at = 0
    for member, _, length in geometry.pieces(0, len(content)):
        files[member] += content[at : at + length]
        at += length
    return [bytes(file) for file in files]


def packed_header(data: bytes) -> None:
    """`data` in the place of either member, beside the other one as it should be."""
    whole = pack_members()
    for damaged in range(2):
        for member, path in enumerate(pack_files()):
            place(str(path), data if member == damaged else whole[member])
        check_pack(str(pack_files()[0]))


def check_pack(path: str) -> None:
    try:
        pack = read_pack(path)
        tensors = read_header(path)
    except CheckpointError as error:
        return check_message(error, workspace())
    if pack is not None:
        for member, at, length in pack.geometry.pieces(0, pack.size):
            inside = PAGE <= at <= at + length <= os.path.getsize(pack.members[member])
            require(inside, "every piece inside its member")
    check_tensors(tensors, {path: pack.size if pack else os.path.getsize(path)})


def split_pack(data: bytes) -> tuple[bytes, bytes]:
    return data[16:PAGE].rstrip(b" "), data[:12] + data[PAGE:]


def join_pack(header: bytes, rest: bytes) -> bytes:
    """With a checksum that is right, so that what lies behind it is reached."""
    page = rest[:12] + bytes(4) + header.ljust(PAGE - 16)
    return page[:12] + zlib.crc32(page).to_bytes(4, "little") + page[16:] + rest[12:]


# A checkpoint's index


def checkpoint_index(data: bytes) -> None:
    index = place(f"index/{INDEX}", data)
    folder = str(index.parent)
    sizes = {}
    for name in ("1.safetensors", "2.safetensors"):
        shard = Path(folder, name)
        if not shard.exists():
            shard.write_bytes(save({"a": torch.zeros(2), name: torch.zeros(3)}))
        sizes[str(shard)] = shard.stat().st_size
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        return check_message(error, folder)
    require(set(checkpoint.shards) <= set(sizes), "no shard but those in the folder")
    check_tensors(checkpoint.tensors, sizes)


def index_seeds() -> list[bytes]:
    both = {"a": "1.safetensors", "1.safetensors": "1.safetensors", "2.safetensors": "2.safetensors"}
    maps = [both, {"a": "2.safetensors"}, {"a": "./1.safetensors"}]
    return [json.dumps({"metadata": {"total_size": 44}, "weight_map": names}).encode() for names in maps]


# The manifest of an entry of the store


def store_entry() -> Entry:
    return Entry([str(workspace() / "store")], "model", "0" * 64, "copy", "/models/it")


def write_store_entry() -> dict[str, FileRecord]:
    """What a copy would write: two files, one of them in a folder below."""
    records = {}
    for name in ("model.safetensors", "deep/config.json"):
        path = Path(store_entry().path(name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"contents")
        records[name] = FileRecord(*hash_file(str(path)), source_size=8, source_mtime_ns=1)
    return records


def store_manifest(data: bytes) -> None:
    folder = Path(store_entry().folder)
    for name in (MANIFEST, MANIFEST + ".done"):
        place(str(folder / name), data)
    try:
        verify(str(folder))
    except StoreError as error:
        check_message(error, folder)
    for name, record in store_entry().done().items():
        require(type(record.size) is int and isinstance(record.sha256, str), "a record of the right types")
        require(os.path.realpath(folder / name).startswith(str(folder) + os.sep), "inside the entry")
    try:
        store_entry().obtain(write_store_entry)
    except StoreError as error:
        check_message(error, folder)


def manifest_seeds() -> list[bytes]:
    entry = store_entry()
    entry.obtain(write_store_entry)
    whole = Path(entry.path(MANIFEST)).read_bytes()
    plain = {"schema": SCHEMA, "files": {"model.safetensors": asdict(FileRecord(8, "0" * 64))}}
    return [whole, whole, json.dumps(plain).encode()]


# The profile of a drive


def drive_profile(data: bytes) -> None:
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(workspace() / "cache")):
        place(str(profile_path(DRIVE)), data)
        profile = load_profile(DRIVE)
    if profile is None:
        return
    require(type(profile.block_bytes) is int and profile.block_bytes.bit_count() == 1, "a power of two")
    require(1 <= profile.depth <= 1024 and 1 <= profile.workers <= 256, "within an engine's limits")
    for rate in (profile.read_rate, profile.write_rate):
        require(rate is None or (type(rate) in (int, float) and 0 < rate < 1e15), "a rate")
    profile.measured.encode()  # it is printed


def profile_seeds() -> list[bytes]:
    seeds = []
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(workspace() / "cache")):
        for rates in ((3.3e9, None), (1.5, 2.0)):
            path = save_profile(DRIVE, Profile("io_uring", 1 << 20, 32, 4, *rates, "2026-11-20T21:00:00"))
            seeds.append(path.read_bytes())
    return seeds


# The trace of a run


def trace_file(data: bytes) -> None:
    path = place("out.json", data)
    try:
        timeline = chrome.read(path)
    except OptionError as error:
        return check_message(error, path)
    for span in timeline.spans:
        require(0 <= span.start <= span.end < 1e11, "a time")
        require(type(span.nbytes) is int and span.nbytes >= 0 and span.thread >= 0, "counts")
        require(isinstance(span.name, str) and isinstance(span.kind, str), "names")
    require(0 <= totals(timeline).bubble_seconds < 1e11, "sums of them")


def trace_seeds() -> list[bytes]:
    spans = (Span(SWEEPS, "0", 0, 2), Span(WAITS, "w", 0, 1), Span(COMPUTE, "w", 1, 2))
    reads = (Span(READS, "w", 0, 1, nbytes=5, kind="demand"),)
    seeds = []
    for timeline in (Timeline("M", spans + reads, ((1.0, 7),), 3), Timeline("M", reads)):
        path = workspace() / "out.json"
        chrome.write(timeline, path)
        document = json.loads(path.read_bytes())
        # Without the samples of the drive's rate, hundreds of events that are passed over.
        document["traceEvents"] = [event for event in document["traceEvents"] if event["name"] != chrome.RATE]
        seeds.append(json.dumps(document).encode())
    return seeds


SAFETENSORS = Framing(split_safetensors, join_safetensors)
TARGETS = {
    "safetensors": Target(safetensors_header, safetensors_seeds, SAFETENSORS),
    "pack": Target(packed_header, pack_members, Framing(split_pack, join_pack)),
    "index": Target(checkpoint_index, index_seeds),
    "manifest": Target(store_manifest, manifest_seeds),
    "profile": Target(drive_profile, profile_seeds),
    "trace": Target(trace_file, trace_seeds),
}
