"""Headers are believed only after every number in them was checked against the file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zinfer.errors import CheckpointError
from zinfer.weights.safetensors_header import DTYPES, MAX_HEADER_BYTES, read_header


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> str:
    """A file with `header` (bytes as they are, anything else as JSON), claiming to be `length` long."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(raw) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + raw + data)
    return str(path)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: str) -> str:
    """What read_header says about a file it must refuse; every message names the file."""
    with pytest.raises(CheckpointError) as info:
        read_header(path)
    assert path in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_found_where_safetensors_wrote_it(tmp_path, name):
    dtype = DTYPES[name]
    raw = torch.arange(24 * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = raw.view(dtype).reshape(4, 6)
    path = str(tmp_path / "model.safetensors")
    save_file({"before": torch.zeros(3, dtype=torch.uint8), "t": tensor}, path, metadata={"format": "pt"})

    found = read_header(path)

    assert set(found) == {"before", "t"}
    assert (found["t"].name, found["t"].path) == ("t", path)
    assert (found["t"].dtype, found["t"].shape) == (dtype, (4, 6))
    stored = Path(path).read_bytes()[found["t"].offset :][: found["t"].length]
    assert stored == bytes(raw.numpy())


def test_scalars_and_empty_tensors_are_tensors(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file({"scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}, path)

    found = read_header(path)

    assert (found["scalar"].shape, found["scalar"].length) == ((), 4)
    assert (found["empty"].shape, found["empty"].length) == ((0, 5), 0)


def test_an_empty_tensor_may_share_its_offset_with_another(tmp_path):
    header = {"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}
    assert set(read_header(write(tmp_path / "f", header, bytes(8)))) == {"a", "b"}


def test_metadata_is_not_a_tensor(tmp_path):
    path = write(tmp_path / "f", {"__metadata__": {"format": "pt"}, "t": entry()}, bytes(8))
    assert set(read_header(path)) == {"t"}


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in refusal(str(tmp_path / "absent.safetensors"))


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_not_a_regular_file_is_refused_without_being_opened(tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert "not a regular file" in refusal(str(path))


def test_a_file_shorter_than_the_length_prefix_is_truncated(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"\x02\0\0")
    assert "truncated" in refusal(str(path))


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    assert "truncated" in refusal(write(tmp_path / "f", {}, length=3))


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    assert str(MAX_HEADER_BYTES + 1) in refusal(str(path))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe\xfd", b"[" * 200_000, b'{"t": ' + b"9" * 5000 + b"}"],
    ids=["empty", "unfinished", "not text", "nested without end", "a number without end"],
)
def test_a_header_that_is_not_json_is_damaged(tmp_path, raw):
    assert "not JSON" in refusal(write(tmp_path / "f", raw))


def test_a_header_that_is_not_an_object_is_damaged(tmp_path):
    assert "not a JSON object" in refusal(write(tmp_path / "f", b"[]"))


def test_a_name_listed_twice_is_refused(tmp_path):
    one = json.dumps(entry())
    raw = f'{{"t": {one}, "t": {one}}}'.encode()
    assert "'t' twice" in refusal(write(tmp_path / "f", raw, bytes(8)))


@pytest.mark.parametrize(
    "fields",
    [
        None,
        7,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [2]},
        entry(offsets=[0]),
        entry(offsets=[0, 4, 8]),
        entry(offsets=8),
        entry(offsets=None),
        entry(offsets=["0", "8"]),
        entry(offsets=[0.0, 8.0]),
        entry(offsets=[False, 8]),
        entry(offsets=[-8, 0]),
        entry(offsets=[8, 0]),
        entry(shape=2),
        entry(shape=None),
        entry(shape="2"),
        entry(shape=[2.0]),
        entry(shape=[True, 2]),
        entry(shape=[-2, -1]),
        entry(shape=[[2]]),
        entry(dtype="F31"),
        entry(dtype=None),
        entry(dtype=["F32"]),
        entry(dtype={"F32": 1}),
        entry(shape=[3]),
        entry(shape=[2**70]),
    ],
    ids=repr,
)
def test_a_malformed_entry_names_its_tensor(tmp_path, fields):
    assert "'t'" in refusal(write(tmp_path / "f", {"t": fields}, bytes(16)))


def test_a_tensor_that_ends_past_the_file_is_truncated(tmp_path):
    message = refusal(write(tmp_path / "f", {"t": entry()}, bytes(7)))
    assert "truncated" in message
    assert "'t'" in message


def test_tensors_that_overlap_are_refused(tmp_path):
    header = {"a": entry(), "b": entry(offsets=[4, 12])}
    message = refusal(write(tmp_path / "f", header, bytes(12)))
    assert "'a' and 'b' overlap" in message


@pytest.mark.parametrize(
    "header",
    [
        {"t" * 100_000: entry(offsets=[0, 4])},
        {"t": entry(dtype="x" * 100_000)},
        {"t": entry(shape=[1] * 100_000)},
        {"t": entry(shape=["2"] * 100_000)},
        {"t": [0] * 100_000},
        {name * 100_000: entry() for name in "ab"},
    ],
    ids=["name", "dtype", "shape", "shape of strings", "entry", "two names"],
)
def test_a_message_stays_short_whatever_the_file_says(tmp_path, header):
    assert len(refusal(write(tmp_path / "f", header, bytes(16)))) < 2000


def test_a_hostile_shape_or_name_is_refused_at_once(tmp_path):
    began = time.monotonic()
    assert "beyond any file" in refusal(
        write(tmp_path / "f", {"t": entry(shape=[2**62] * 300_000)}, bytes(8))
    )
    pairs = ",".join(f'"{number}": 0' for number in range(300_000))
    assert "'299999' twice" in refusal(write(tmp_path / "f", f'{{{pairs},"299999": 0}}'.encode()))
    assert time.monotonic() - began < 10
