"""The shards that a model streams from, plain files or striped over drives: reads of shards become reads of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zinfer.aio.drives import Drives, Extent
from zinfer.aio.joint import Waitable
from zinfer.weights.layout import PAGE
from zinfer.weights.packed import Geometry, read_pack

ShardExtent = tuple[str, int, int, int, bool]


class Shards:
    """Opens the shards `paths`, each with all members; reads `(path, offset, length, address, slack)` of them.

    Owns its `drives`, which hold the files and engines. Any thread may call any method. Raises CheckpointError for a
    shard that is not complete, and what Drives raises.
    """

    def __init__(self, paths: Sequence[str], bounce_bytes: int) -> None:
        packs = {path: read_pack(path) for path in paths}
        self._members = {path: (path,) if pack is None else pack.members for path, pack in packs.items()}
        self._geometry: dict[str, Geometry | None] = {
            path: None if pack is None else pack.geometry for path, pack in packs.items()
        }
        self.drives = Drives(
            [member for members in self._members.values() for member in members], bounce_bytes
        )

    def read(
        self, extents: Sequence[ShardExtent], keepalive: object = None, *, urgent: bool = False
    ) -> Waitable:
        """Start reading every extent, as `Drives.read` does."""
        return self.drives.read(
            [piece for extent in extents for piece in self._pieces(*extent)], keepalive, urgent=urgent
        )

    def changed(self, path: str) -> str | None:
        """The file of the shard `path` that may hold other bytes than at open, or None."""
        files = self.drives.files
        return next((member for member in self._members[path] if files[member].changed()), None)

    def _pieces(self, path: str, offset: int, length: int, address: int, slack: bool) -> Iterator[Extent]:
        geometry, members = self._geometry[path], self._members[path]
        pieces = [(0, offset, length)] if geometry is None else geometry.pieces(offset, length)
        for member, at, taken in pieces:
            file = self.drives.files[members[member]]
            # Beyond a page, what lies around a stripe is its neighbour, and no scratch.
            yield file, at, taken, address, slack and file.alignment <= PAGE
            address += taken
