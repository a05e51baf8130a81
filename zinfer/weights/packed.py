"""Shards striped over several drives: the geometry and the headers of their member files.

A packed shard is one file of the same name in each of n folders, its members. Each begins with a header page:

    0   8 bytes   magic "ZINFPACK": as the header length of a safetensors file it is absurd, so other tools refuse it
    8   4         version, little-endian
    12  4         CRC-32 of the page, these four bytes taken as zero
    16  4080      JSON, padded with spaces: set, member, stripe, size, folders

and goes on with its stripes. Byte o of the shard lies in member (o // stripe) % n, at

    PAGE + o // (stripe * n) * stripe + o % stripe

so offsets keep their residue modulo PAGE, and bytes that can be read in place from the shard can be from its members.
Nothing in a header is believed before it was checked against all members.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from zinfer.errors import CheckpointError, OptionError

MAGIC = b"ZINFPACK"
VERSION = 1
PAGE = 4096
STRIPE = 1 << 20
MAX_STRIPE = 1 << 30
MAX_BYTES = (1 << 63) - 1
ANEW = "pass nvme_path again, with all its folders, to write it anew"


@dataclass(frozen=True)
class Geometry:
    """How `size` bytes are spread over `count` members in stripes of `stripe` bytes, a multiple of PAGE."""

    count: int
    stripe: int
    size: int

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """`(member, offset in it, length)` of the pieces, in order, that make up `length` bytes at `offset`."""
        end = offset + length
        while offset < end:
            number, inside = divmod(offset, self.stripe)
            row, member = divmod(number, self.count)
            taken = min(self.stripe - inside, end - offset)
            yield member, PAGE + row * self.stripe + inside, taken
            offset += taken

    def member_bytes(self, member: int) -> int:
        """Size in bytes of that member's file."""
        full, rest = divmod(self.size, self.stripe)
        rows, last = divmod(full, self.count)
        return PAGE + (rows + (member < last)) * self.stripe + (rest if member == last else 0)


@dataclass(frozen=True)
class Header:
    """What one member says of itself and its set. `set_id`: 32 hex digits; `folders`: those of all members."""

    set_id: str
    member: int
    geometry: Geometry
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Pack:
    """A packed shard: `members` are its files in order, all there and of one set."""

    members: tuple[str, ...]
    set_id: str
    geometry: Geometry

    @property
    def size(self) -> int:
        """Bytes of the shard."""
        return self.geometry.size


def format_page(header: Header) -> bytes:
    """The header page. Raises OptionError when the folders' paths do not fit it."""
    fields = {
        "set": header.set_id,
        "member": header.member,
        "stripe": header.geometry.stripe,
        "size": header.geometry.size,
        "folders": header.folders,
    }
    text = json.dumps(fields).encode()
    if len(text) > PAGE - 16:
        raise OptionError(
            f"the {len(header.folders)} paths {header.folders[0]} ... are too long to be striped over; "
            "mount the drives under shorter paths"
        )
    return _sealed(MAGIC + VERSION.to_bytes(4, "little") + bytes(4) + text.ljust(PAGE - 16))


def parse_page(path: str, page: bytes) -> Header:
    """The header in `page`, which begins with MAGIC. Raises CheckpointError naming `path`."""
    version = int.from_bytes(page[8:12], "little")
    if len(page) != PAGE:
        raise CheckpointError(f"{path}: ends within its header, at byte {len(page)} of {PAGE}; {ANEW}")
    if version != VERSION:
        raise CheckpointError(
            f"{path}: striped in version {version} of the format, this zinfer reads {VERSION}; {ANEW}"
        )
    if _sealed(page) != page:
        raise CheckpointError(f"{path}: the header's checksum is wrong: it is damaged; {ANEW}")
    try:
        fields = json.loads(page[16:])
        folders = fields["folders"] if isinstance(fields["folders"], list) else []
        geometry = Geometry(len(folders), fields["stripe"], fields["size"])
        header = Header(fields["set"], fields["member"], geometry, tuple(folders))
        fault = _fault(header)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise CheckpointError(f"{path}: the header makes no sense ({fault}); {ANEW}")
    return header


def read_pack(path: str) -> Pack | None:
    """The packed shard whose member 0 is the file `path`; None for a file that does not begin with MAGIC.

    Raises CheckpointError for a file that cannot be read, a damaged header, and a set that is not complete.
    """
    page, size = _first_page(
        path, f"{path}: cannot read this shard", "the checkpoint is incomplete, fetch it again"
    )
    if not page.startswith(MAGIC):
        return None
    header = parse_page(path, page)
    folders, count = header.folders, header.geometry.count
    if header.member:
        raise CheckpointError(
            f"{path}: member {header.member} of a checkpoint striped over {count} drives; use the folder of "
            f"member 0, {folders[0]}"
        )
    members = (path, *(os.path.join(folder, os.path.basename(path)) for folder in folders[1:]))
    _check_size(path, size, header)
    for number in range(1, count):
        _check_member(path, header, members[number], number)
    return Pack(members, header.set_id, header.geometry)


def read_bytes(pack: Pack, offset: int, length: int) -> bytes:
    """`length` bytes at `offset` of the shard, through the page cache. Raises CheckpointError."""
    out = bytearray()
    try:
        with ExitStack() as closing:
            files = [closing.enter_context(open(member, "rb", buffering=0)) for member in pack.members]
            for member, at, taken in pack.geometry.pieces(offset, length):
                part = os.pread(files[member].fileno(), taken, at)
                if len(part) != taken:
                    raise CheckpointError(f"{pack.members[member]}: ends at byte {at + len(part)}; {ANEW}")
                out += part
    except OSError as error:
        raise CheckpointError(
            f"{pack.members[0]}: cannot read all members of this shard: {error}; check the drives"
        ) from error
    return bytes(out)


def _sealed(page: bytes) -> bytes:
    """`page` with the checksum in its place."""
    bare = page[:12] + bytes(4) + page[16:]
    return bare[:12] + zlib.crc32(bare).to_bytes(4, "little") + bare[16:]


def _fault(header: Header) -> str:
    """What no writer would have written there, or ""."""
    count, stripe, size = header.geometry.count, header.geometry.stripe, header.geometry.size
    if not isinstance(header.set_id, str) or not re.fullmatch("[0-9a-f]{32}", header.set_id):
        return f"set {header.set_id!r}"
    if count < 2 or not all(map(_is_folder, header.folders)):
        return f"folders {header.folders!r}"
    if type(header.member) is not int or not 0 <= header.member < count:
        return f"member {header.member!r} of {count}"
    if type(stripe) is not int or not 0 < stripe <= MAX_STRIPE or stripe % PAGE:
        return f"stripe {stripe!r}"
    if type(size) is not int or not 0 <= size <= MAX_BYTES:
        return f"size {size!r}"
    return ""


def _is_folder(text: Any) -> bool:
    """Whether `text` is an absolute path. Raises ValueError for text that no file name can be."""
    return isinstance(text, str) and os.path.isabs(text) and b"\0" not in os.fsencode(text)


def _first_page(path: str, trouble: str, remedy: str) -> tuple[bytes, int]:
    """The first PAGE bytes, or all there are, and the size of the regular file `path`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for a writer
            raise CheckpointError(f"{path}: not a regular file; a shard has to be a plain safetensors file")
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), PAGE, 0), os.fstat(file.fileno()).st_size
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{trouble}: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise CheckpointError(f"{path!r}: no file can have this name ({error}); {remedy}") from error


def _check_member(path: str, header: Header, member: str, number: int) -> None:
    """Raises CheckpointError unless the file `member` is the one that `path`, with `header`, belongs with."""
    trouble = f"{member}: cannot read this member of {path}, striped over {header.geometry.count} drives"
    page, size = _first_page(member, trouble, f"mount {header.folders[number]}, or {ANEW}")
    expected = Header(header.set_id, number, header.geometry, header.folders)
    if not page.startswith(MAGIC) or (found := parse_page(member, page)).set_id != header.set_id:
        raise CheckpointError(f"{member}: not of one set with {path}: it was written at another time; {ANEW}")
    if found != expected:
        raise CheckpointError(f"{member}: says that it is {found}, but {path} makes it {expected}; {ANEW}")
    _check_size(member, size, expected)


def _check_size(path: str, size: int, header: Header) -> None:
    if size != (due := header.geometry.member_bytes(header.member)):
        raise CheckpointError(
            f"{path}: has {size} bytes, member {header.member} of its set has {due}; {ANEW}"
        )
