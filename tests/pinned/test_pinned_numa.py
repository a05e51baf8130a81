"""Memory from the NUMA node asked for, read back from the kernel; refusals; and which node to ask for."""

import ctypes
import errno
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreters import LIBRARIES_ONLY
from zinfer.errors import OptionError
from zinfer.pinned import COMPILED, Pool
from zinfer.pinned.numa import node_for, online_nodes

COMPILED_ONLY = True
pytestmark = pytest.mark.skipif(not COMPILED, reason="only the compiled pool binds to nodes")
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}.get(platform.machine())
NODE, ADDR = 1, 2  # MPOL_F_NODE, MPOL_F_ADDR
PREFERRED = 1  # MPOL_PREFERRED


def ask_kernel(address, flags):
    """What get_mempolicy(2) says of the page at `address`: its node, or without NODE its policy."""
    if GET_MEMPOLICY is None:
        pytest.skip("no number for get_mempolicy on this machine")
    libc, answer = ctypes.CDLL(None, use_errno=True), ctypes.c_int(-1)
    if libc.syscall(GET_MEMPOLICY, ctypes.byref(answer), None, 0, ctypes.c_void_p(address), flags) != 0:
        pytest.skip(f"get_mempolicy: {errno.errorcode[ctypes.get_errno()]}")
    return answer.value


@pytest.mark.parametrize("node", online_nodes())
def test_every_slab_lies_on_the_node_asked_for(node):
    pool = Pool(6 * MIB, page_lock="off", slab_bytes=2 * MIB, numa_node=node)
    for at in (0, 2 * MIB, 4 * MIB, 6 * MIB - 1):
        policy = ask_kernel(pool.base_address + at, ADDR)
        if pool.numa_reason:
            pytest.skip(pool.numa_reason)
        assert policy == PREFERRED
        assert ask_kernel(pool.base_address + at, ADDR | NODE) == node


def test_no_node_asked_for_leaves_the_policy_alone_and_no_reason():
    pool = Pool(2 * MIB, page_lock="off")
    assert pool.numa_reason == ""
    assert ask_kernel(pool.base_address, ADDR) != PREFERRED


@pytest.mark.parametrize("node", [-1, max(online_nodes()) + 1, 100_000])
def test_an_absent_node_is_an_error_that_names_those_online(node):
    names = ", ".join(map(str, online_nodes()))
    with pytest.raises(OptionError, match=rf"numa_node is {node}, but the nodes online are: {names}$"):
        Pool(2 * MIB, page_lock="off", numa_node=node)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no system call numbers")
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_a_refused_mbind_is_the_reason_and_the_pool_works(code):
    program = f"""
from tests.aio import seccomp
from zinfer.pinned import Pool
from zinfer.pinned.numa import online_nodes

try:
    seccomp.refuse("mbind", {code})
except (OSError, AssertionError):
    print("no seccomp here")
else:
    pool = Pool(4 << 20, page_lock="off", slab_bytes=2 << 20, numa_node=online_nodes()[0])
    memoryview(pool.acquire(4 << 20))[-1] = 1
    print(pool.numa_reason)
    pool.close()
    assert pool.numa_reason == "the pool is closed"
"""
    command = [sys.executable, "-W", "error", "-c", LIBRARIES_ONLY + program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout == "no seccomp here\n":
        pytest.skip("seccomp is not to be had")
    assert done.stdout.startswith(f"mbind to node {online_nodes()[0]}: ")
    assert f"(errno {code})" in done.stdout


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("0\n", [0]),
        ("0-1\n", [0, 1]),
        ("0-2,4,6-7\n", [0, 1, 2, 4, 6, 7]),
        ("1,3\n", [1, 3]),
        ("\n", [0]),
    ],
)
def test_the_kernels_list_of_nodes_is_understood(tmp_path, text, nodes):
    (tmp_path / "online").write_text(text)
    assert online_nodes(str(tmp_path / "online")) == nodes


def test_a_kernel_that_lists_no_nodes_has_one(tmp_path):
    assert online_nodes(str(tmp_path / "absent")) == [0]


@pytest.mark.parametrize(
    ("nodes", "online", "wanted"),
    [
        ([1], [0, 1], 1),
        ([0, 0, 0], [0, 1], 0),
        ([0, 0], [0], None),  # nothing to choose from
        ([0, 1], [0, 1], None),
        ([1, None], [0, 1], None),
        ([None], [0, 1], None),
        ([], [0, 1], None),
        ([3], [0, 1], None),
    ],
)
def test_memory_goes_to_the_node_that_all_devices_share(nodes, online, wanted):
    assert node_for(nodes, online) == wanted
