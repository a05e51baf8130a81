"""Random acquires and releases of the pinned pool; millions by hand: `--pool-operations 40000000`."""

import re
import subprocess

import pytest

from .compiling import PINNED, compile_program, needs_compiler

SHAPES = ("fifo", "nearly fifo", "uniform", "threads")


@pytest.fixture(scope="module")
def figures(objects, pytestconfig):
    """What the program printed: shape -> name -> number. It fails by itself for overlaps and lost bytes."""
    operations = pytestconfig.getoption("--pool-operations")
    program = compile_program("pool_soak", PINNED, objects, ["-O1", "-g"], uring=False)
    command = [str(program), str(operations), str(operations % 1000)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = {}
    for line in done.stdout.splitlines():
        shape, _, rest = line.partition(": ")
        found[shape] = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", rest)}
    assert sum(shape["operations"] for shape in found.values()) >= 0.99 * operations
    return found


@needs_compiler
def test_no_region_overlaps_another_or_loses_its_bytes_and_the_empty_pool_is_one_run(figures):
    assert tuple(figures) == SHAPES


@needs_compiler
@pytest.mark.parametrize(("shape", "least"), [("fifo", 0.85), ("nearly fifo", 0.7), ("uniform", 0.55)])
def test_a_refusal_finds_the_pool_well_filled_and_that_does_not_wear_off(figures, shape, least):
    assert figures[shape]["refusals"] > 0
    assert figures[shape]["full"] > least
    assert figures[shape]["late"] > figures[shape]["early"] - 0.06, "fragmentation grows"


@needs_compiler
def test_a_window_in_fifo_order_is_never_refused_with_eight_of_the_longest_to_spare(figures):
    assert figures["fifo"]["spare"] < 8
