"""Which NUMA node a pool's memory should lie on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zinfer.pinned import COMPILED

if TYPE_CHECKING or COMPILED:
    from zinfer.pinned._native import online_nodes
else:
    from zinfer.pinned.portable.numa import online_nodes

__all__ = ["node_for", "online_nodes"]


def node_for(nodes: Sequence[int | None], online: Sequence[int]) -> int | None:
    """The node for memory that devices on `nodes` (drives, a GPU) read and write: theirs if they share one.

    None for no preference: with a single node `online` (see `online_nodes`), with devices on different nodes,
    or on one that is unknown (None) or not online.
    """
    if len(online) < 2 or len(set(nodes)) != 1 or nodes[0] not in online:
        return None
    return nodes[0]
