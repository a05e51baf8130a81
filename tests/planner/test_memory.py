"""Sizes as people write them, and what the machine and every cgroup above this process have free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zinfer.errors import OptionError
from zinfer.planner import memory
from zinfer.planner.memory import ceilings, free_memory, parse_size, process_peak, total_memory

MACHINE_TOTAL = 64 << 30
MACHINE_FREE = 48 << 30
GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, 1),
        (3 << 30, 3 << 30),
        ("3221225472", 3221225472),
        ("512 B", 512),
        ("3GiB", 3 << 30),
        ("3 gib", 3 << 30),
        ("3G", 3 << 30),
        ("3GB", 3_000_000_000),
        ("500MB", 500_000_000),
        ("1.5GiB", 3 << 29),
        ("0.5k", 512),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1T", 1 << 40),
        ("1TB", 10**12),
        ("  7M ", 7 << 20),
    ],
)
def test_a_size_is_bytes_or_text_with_a_unit(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize(
    "size",
    [
        0,
        -1,
        "0",
        "0GiB",
        "0.1",
        "-3GiB",
        "",
        "GiB",
        "3 GiBs",
        "3XB",
        "1e9",
        "3,5GiB",
        "3GiB 5",
        3.5,
        True,
        None,
        [],
        b"3G",
        "9" * 400,
    ],
    ids=lambda size: repr(size)[:12],
)
def test_anything_else_is_refused_with_an_example(size):
    with pytest.raises(OptionError, match=r"is not a memory size.*3GiB"):
        parse_size(size)


def test_the_ceiling_is_the_cpu_entry():
    assert ceilings(None, None) == (None, None)
    assert ceilings({}, 0) == (None, None)
    assert ceilings({"cpu": "8GiB"}, None) == (8 * GIB, None)


@pytest.mark.parametrize("key", [1, "cuda:1"])
def test_a_device_has_a_ceiling_by_its_number_or_name(key):
    assert ceilings({"cpu": "8GiB", key: "1GiB"}, 1) == (8 * GIB, GIB)
    assert ceilings({"cuda": GIB}, 0) == (None, GIB)


@pytest.mark.parametrize("max_memory", [{0: 1}, {True: 1}, {"cuda": 1}, {"cuda:0": 1}, {"gpu": 1}], ids=str)
def test_a_ceiling_of_another_device_is_refused(max_memory):
    with pytest.raises(OptionError, match="computes on device 1"):
        ceilings(max_memory, 1)


def test_a_device_that_is_named_twice_is_refused():
    with pytest.raises(OptionError, match="twice"):
        ceilings({0: 1, "cuda:0": 2}, 0)


@pytest.mark.parametrize("max_memory", [{0: "20GiB"}, {"cpu": "8GiB", 0: "20GiB"}, {"gpu": 1}], ids=str)
def test_an_entry_without_effect_is_refused(max_memory):
    with pytest.raises(OptionError, match="only 'cpu' has an effect"):
        ceilings(max_memory, None)


@pytest.mark.parametrize("max_memory", ["8GiB", 8 * GIB, ["8GiB"]], ids=repr)
def test_a_ceiling_that_is_no_mapping_is_refused(max_memory):
    with pytest.raises(OptionError, match="give a mapping"):
        ceilings(max_memory, None)


# -- cgroups --------------------------------------------------------------------------------------------

V1 = SimpleNamespace(
    limit="memory.limit_in_bytes", usage="memory.usage_in_bytes", inactive="total_inactive_file"
)
V2 = SimpleNamespace(limit="memory.max", usage="memory.current", inactive="inactive_file")
NO_LIMIT = {V1.limit: 9223372036854771712, V2.limit: "max"}


class Tree:
    """A cgroup file system under `root` and this process's place in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[str] = []

    def group(self, path: str, kind: Any, limit: object, used: int, inactive: int = 0) -> None:
        """A memory cgroup at `path` below the root; `limit` in bytes or as the kernel writes none."""
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / kind.limit).write_text(f"{limit}\n")
        (folder / kind.usage).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"cache 17\nanon 3\n{kind.inactive} {inactive}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path / "cgroup")
    real: Callable[[Path], list[str]] = memory._lines
    monkeypatch.setattr(memory, "CGROUP_ROOT", made.root)
    monkeypatch.setattr(memory, "_lines", lambda p: made.lines if p == Path("/proc/self/cgroup") else real(p))
    figures = SimpleNamespace(total=MACHINE_TOTAL, available=MACHINE_FREE)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: figures)
    return made


def test_without_cgroups_the_machine_decides(tree):
    assert (total_memory(), free_memory()) == (MACHINE_TOTAL, MACHINE_FREE)


def test_a_version_2_group_limits_what_is_free(tree):
    tree.lines = ["0::/user/app"]
    tree.group("user/app", V2, limit=4 * GIB, used=GIB)
    assert (total_memory(), free_memory()) == (4 * GIB, 3 * GIB)


def test_a_version_1_group_limits_what_is_free(tree):
    tree.lines = ["5:cpu,cpuacct:/elsewhere", "4:memory:/docker/x", "1:name=systemd:/y"]
    tree.group("memory/docker/x", V1, limit=4 * GIB, used=GIB)
    tree.group("memory", V1, limit=NO_LIMIT[V1.limit], used=40 * GIB)
    assert (total_memory(), free_memory()) == (4 * GIB, 3 * GIB)


def test_controllers_mounted_together_are_recognised(tree):
    tree.lines = ["4:hugetlb,memory:/x"]
    tree.group("memory/x", V1, limit=4 * GIB, used=GIB)
    assert free_memory() == 3 * GIB


def test_a_hybrid_tree_has_its_version_2_groups_under_unified(tree):
    tree.lines = ["0::/app"]
    tree.group("unified/app", V2, limit=4 * GIB, used=GIB)
    assert free_memory() == 3 * GIB


@pytest.mark.parametrize(
    ("line", "below", "kind"), [("0::/", "", V2), ("4:memory:/", "memory/", V1)], ids=["v2", "v1"]
)
@pytest.mark.parametrize("tight", ["a", "a/b", "a/b/c"])
def test_the_tightest_of_all_ancestors_decides(tree, line, below, kind, tight):
    tree.lines = [f"{line}a/b/c"]
    for path in ("a", "a/b", "a/b/c"):
        limit, used = (4 * GIB, 3 * GIB) if path == tight else (10 * GIB, 2 * GIB)
        tree.group(below + path, kind, limit, used)
    assert (total_memory(), free_memory()) == (4 * GIB, GIB)


def test_total_and_free_may_come_from_different_ancestors(tree):
    tree.lines = ["0::/a/b"]
    tree.group("a", V2, limit=8 * GIB, used=7 * GIB)
    tree.group("a/b", V2, limit=4 * GIB, used=GIB)
    assert (total_memory(), free_memory()) == (4 * GIB, GIB)


@pytest.mark.parametrize(
    ("line", "below", "kind"), [("0::/a", "", V2), ("4:memory:/a", "memory/", V1)], ids=["v2", "v1"]
)
def test_inactive_file_pages_count_as_free(tree, line, below, kind):
    tree.lines = [line]
    tree.group(below + "a", kind, limit=4 * GIB, used=3 * GIB, inactive=2 * GIB)
    assert free_memory() == 3 * GIB


def test_a_version_1_group_counts_the_file_pages_of_its_children_too(tree):
    tree.lines = ["4:memory:/a"]
    tree.group("memory/a", V1, limit=4 * GIB, used=3 * GIB)
    (tree.root / "memory/a/memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {GIB}\n")
    assert free_memory() == 2 * GIB


@pytest.mark.parametrize(
    ("line", "below", "kind"), [("0::/a", "", V2), ("4:memory:/a", "memory/", V1)], ids=["v2", "v1"]
)
def test_a_group_without_a_limit_changes_nothing(tree, line, below, kind):
    tree.lines = [line]
    tree.group(below + "a", kind, limit=NO_LIMIT[kind.limit], used=GIB)
    assert (total_memory(), free_memory()) == (MACHINE_TOTAL, MACHINE_FREE)


def test_a_group_over_its_limit_leaves_nothing_not_less(tree):
    tree.lines = ["0::/a"]
    tree.group("a", V2, limit=GIB, used=2 * GIB)
    assert free_memory() == 0


def test_a_containers_own_mount_is_found_though_the_path_is_the_hosts(tree):
    tree.lines = ["4:memory:/docker/0123"]
    tree.group("memory", V1, limit=4 * GIB, used=GIB)
    assert free_memory() == 3 * GIB


@pytest.mark.parametrize("line", ["0::/../../x", "4:memory:/../x", "0::/with:colon"])
def test_a_strange_place_does_no_harm(tree, line):
    tree.lines = [line]
    assert free_memory() == MACHINE_FREE


def test_a_group_with_a_colon_in_its_name_is_found(tree):
    tree.lines = ["0::/a:b"]
    tree.group("a:b", V2, limit=4 * GIB, used=GIB)
    assert free_memory() == 3 * GIB


def test_a_group_without_statistics_counts_all_its_use(tree):
    tree.lines = ["0::/a"]
    tree.group("a", V2, limit=4 * GIB, used=GIB, inactive=GIB)
    (tree.root / "a/memory.stat").unlink()
    assert free_memory() == 3 * GIB


def test_the_real_figures_are_plausible():
    assert 0 <= free_memory() <= total_memory()
    assert 1 << 20 < process_peak() < 1 << 50
