"""Striped shards: the geometry against a naive model, and headers that are believed only where all members agree."""

from __future__ import annotations

import json
import os
import random
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from zinfer.errors import CheckpointError, OptionError
from zinfer.weights.packed import (
    MAGIC,
    PAGE,
    STRIPE,
    VERSION,
    Geometry,
    Header,
    format_page,
    parse_page,
    read_bytes,
    read_pack,
)
from zinfer.weights.safetensors_header import read_header

SET = "0123456789abcdef" * 2
SHARD = "model.safetensors"


def stripe_naively(content, count, stripe):
    """The bytes of each member after its header page, stripe by stripe."""
    members = [bytearray() for _ in range(count)]
    for number, start in enumerate(range(0, len(content), stripe)):
        members[number % count] += content[start : start + stripe]
    return members


geometries = st.builds(
    Geometry, st.integers(2, 5), st.integers(1, 3).map(lambda pages: pages * PAGE), st.integers(0, 60_000)
)


@given(geometries, st.data())
def test_any_range_is_where_the_naive_model_has_it(geometry, data):
    content = random.Random(geometry.size).randbytes(geometry.size)
    members = [bytes(PAGE) + body for body in stripe_naively(content, geometry.count, geometry.stripe)]
    assert [len(member) for member in members] == [
        geometry.member_bytes(number) for number in range(geometry.count)
    ]
    offset = data.draw(st.integers(0, geometry.size))
    length = data.draw(st.integers(0, geometry.size - offset))
    pieces = list(geometry.pieces(offset, length))
    assert (
        b"".join(members[number][at : at + taken] for number, at, taken in pieces)
        == (content[offset : offset + length])
    )
    cursor = offset
    for _, at, taken in pieces:
        assert taken > 0
        assert at % PAGE == cursor % PAGE, "in-place reads need the shard's own residue"
        cursor += taken


@given(st.integers(2, 64), st.integers(0, 1 << 50))
def test_members_hold_the_shard_and_a_page_each_and_differ_by_a_stripe_at_most(count, size):
    geometry = Geometry(count, STRIPE, size)
    members = [geometry.member_bytes(number) for number in range(count)]
    assert sum(members) == size + count * PAGE
    assert max(members) - min(members) <= STRIPE


# Files


def write_members(tmp_path, content, count=2, stripe=PAGE, fields=None):
    """A set of member files of `content`; `fields` replace some of every header. Their paths."""
    folders = [tmp_path / f"drive{number}" for number in range(count)]
    geometry = Geometry(count, stripe, len(content))
    for number, body in enumerate(stripe_naively(content, count, stripe)):
        folders[number].mkdir(exist_ok=True)
        header = Header(SET, number, geometry, tuple(map(str, folders)))
        page = sealed({**json.loads(format_page(header)[16:]), **(fields or {})})
        (folders[number] / SHARD).write_bytes(page + body)
    return [folder / SHARD for folder in folders]


def sealed(document, version=VERSION):
    """A header page with a right checksum around any document, or any bytes."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    bare = MAGIC + version.to_bytes(4, "little") + bytes(4) + text.ljust(PAGE - 16)[: PAGE - 16]
    return bare[:12] + zlib.crc32(bare).to_bytes(4, "little") + bare[16:]


def refusal(path, read=read_pack):
    with pytest.raises(CheckpointError) as caught:
        read(str(path))
    return str(caught.value)


@pytest.fixture
def members(tmp_path):
    return write_members(tmp_path, random.Random(1).randbytes(30_000))


def test_a_whole_set_is_found_and_reads_as_the_shard(members):
    pack = read_pack(str(members[0]))
    assert pack.members == tuple(map(str, members)) and pack.size == 30_000
    content = random.Random(1).randbytes(30_000)
    assert read_bytes(pack, 0, 30_000) == content
    assert read_bytes(pack, 4000, 9000) == content[4000:13_000]


@pytest.mark.parametrize("content", [b"", b"x", b"ZINFPAC", bytes(5000)])
def test_a_plain_file_is_no_pack(tmp_path, content):
    (tmp_path / SHARD).write_bytes(content)
    assert read_pack(str(tmp_path / SHARD)) is None


def test_the_header_of_a_striped_shard_reads_as_that_of_the_plain_one(tmp_path):
    tensors = {f"t{number}": torch.rand(50, 7) for number in range(40)}
    content = save(tensors)
    (tmp_path / "plain.safetensors").write_bytes(content)
    first, *_ = write_members(tmp_path, content, count=3)
    plain, striped = read_header(str(tmp_path / "plain.safetensors")), read_header(str(first))
    assert striped.keys() == plain.keys()
    for name, entry in striped.items():
        assert entry.path == str(first)
        assert (entry.offset, entry.length) == (plain[name].offset, plain[name].length)


def test_other_tools_refuse_a_member(members):
    with pytest.raises(SafetensorError), safe_open(members[0], "pt"):
        pass


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_striped_shard_too_small_for_a_header_is_refused(tmp_path, size):
    first, _ = write_members(tmp_path, bytes(size))
    assert "truncated or not a safetensors file" in refusal(first, read_header)


def test_a_missing_member_names_its_folder_and_the_remedy(members):
    members[1].unlink()
    text = refusal(members[0])
    assert f"{members[1]}: cannot read this member of {members[0]}" in text
    assert f"mount {members[1].parent}, or pass nvme_path again" in text


def test_a_member_other_than_the_first_points_to_it(members):
    assert f"use the folder of member 0, {members[0].parent}" in refusal(members[1])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("change", [-1, 1, -PAGE])
def test_a_member_of_another_size_is_refused(members, number, change):
    os.truncate(members[number], members[number].stat().st_size + change)
    text = refusal(members[0])
    assert f"{members[number]}: has" in text and "pass nvme_path again" in text


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("left", [8, 100, PAGE - 1])
def test_a_member_cut_within_its_header_is_refused(members, number, left):
    os.truncate(members[number], left)
    assert f"{members[number]}: ends within its header" in refusal(members[0])


def test_a_member_of_another_set_is_refused(members, tmp_path):
    (tmp_path / "later").mkdir()
    content = members[1].read_bytes()
    fields = json.loads(content[16:PAGE]) | {"set": "f" * 32}
    members[1].write_bytes(sealed(fields) + content[PAGE:])
    assert "written at another time" in refusal(members[0])
    members[1].write_bytes(bytes(len(content)))
    assert "written at another time" in refusal(members[0])


@pytest.mark.parametrize(
    "fields", [{"member": 0}, {"stripe": 2 * PAGE}, {"size": 29_999}, {"folders": ["/a", "/b"]}]
)
def test_a_member_that_contradicts_the_first_is_refused(members, fields):
    content = members[1].read_bytes()
    members[1].write_bytes(sealed(json.loads(content[16:PAGE]) | fields) + content[PAGE:])
    assert f"{members[1]}: says that it is" in refusal(members[0])


def test_a_member_that_is_a_pipe_is_not_waited_for(members):
    members[1].unlink()
    os.mkfifo(members[1])
    assert "not a regular file" in refusal(members[0])


@pytest.mark.parametrize("at", [8, 9, 12, 15, 16, 100, PAGE - 1])
def test_any_damage_to_a_header_is_found(members, at):
    content = bytearray(members[0].read_bytes())
    content[at] ^= 0x40
    members[0].write_bytes(content)
    assert str(members[0]) in refusal(members[0])


def test_another_version_says_so(members):
    content = members[0].read_bytes()
    members[0].write_bytes(sealed(json.loads(content[16:PAGE]), version=2) + content[PAGE:])
    assert "version 2 of the format, this zinfer reads 1" in refusal(members[0])


HOSTILE = [
    {"set": 5},
    {"set": "../../etc"},
    {"set": SET.upper()},
    {"member": -1},
    {"member": 2},
    {"member": True},
    {"member": 0.0},
    {"member": None},
    {"stripe": 0},
    {"stripe": -PAGE},
    {"stripe": 4097},
    {"stripe": 1 << 40},
    {"stripe": "4096"},
    {"stripe": float("nan")},
    {"size": -1},
    {"size": 1 << 63},
    {"size": 10**1000},
    {"size": float("inf")},
    {"size": [30_000]},
    {"folders": []},
    {"folders": ["/only"]},
    {"folders": "//"},
    {"folders": {"/a": 1, "/b": 2}},
    {"folders": ["relative", "/b"]},
    {"folders": ["/a", 5]},
    {"folders": ["/a", "/nul\0"]},
    {"folders": ["/a", "/lone\ud800surrogate"]},
    {"folders": [["/a"], ["/b"]]},
    {"folders": None},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: str(fields)[:40])
def test_a_header_that_no_writer_writes_is_refused(tmp_path, fields):
    first, *_ = write_members(tmp_path, bytes(30_000), fields=fields)
    assert "makes no sense" in refusal(first)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"[" * 4080,
        b'{"a":' * 800,
        b"9" * 4080,
        b"\xff\xfe",
        b"{}",
    ],
    ids=lambda document: str(document[:8]),
)
def test_a_header_that_is_no_header_is_refused(tmp_path, document):
    (tmp_path / SHARD).write_bytes(sealed(document) + bytes(5000))
    assert "makes no sense" in refusal(tmp_path / SHARD)


@given(st.binary(max_size=PAGE - 16), st.booleans())
def test_random_bytes_are_refused_and_nothing_else_happens(tail, checked):
    page = sealed(tail) if checked else MAGIC + tail
    with pytest.raises(CheckpointError):
        parse_page("a file", page)


@given(
    st.dictionaries(
        st.sampled_from(["set", "member", "stripe", "size", "folders"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab/", max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3)
            ),
        ),
    )
)
def test_any_json_is_a_header_or_refused(fields):
    whole = {"set": SET, "member": 0, "stripe": PAGE, "size": 0, "folders": ["/a", "/b"]}
    try:
        header = parse_page("a file", sealed(whole | fields))
    except CheckpointError:
        return
    assert 0 <= header.member < header.geometry.count == len(header.folders)
    assert header.geometry.size >= 0 < header.geometry.stripe


def test_a_header_comes_back_as_it_was_written():
    header = Header(SET, 1, Geometry(3, STRIPE, 1 << 62), ("/a", "/b c", "/ü\udcff"))
    assert parse_page("a file", format_page(header)) == header


def test_paths_that_no_header_can_hold_are_refused():
    folders = tuple(f"/{'x' * 250}/{number}" for number in range(20))
    with pytest.raises(OptionError, match="too long to be striped over"):
        format_page(Header(SET, 0, Geometry(20, STRIPE, 0), folders))


def test_a_name_that_no_file_can_have_is_refused():
    assert "no file can have this name" in refusal("/tmp/\ud800")


def test_a_set_that_shrinks_after_it_was_opened_is_an_error_of_the_member(members):
    pack = read_pack(str(members[0]))
    os.truncate(members[1], PAGE + 10)
    with pytest.raises(CheckpointError, match=f"{members[1]}: ends at byte"):
        read_bytes(pack, 0, 30_000)
    members[1].unlink()
    with pytest.raises(CheckpointError, match="cannot read all members"):
        read_bytes(pack, 0, 30_000)
