"""A few hundred damaged files for each parser, the same ones every time, and every past failure again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .__main__ import CORPUS
from .mutate import Mutator
from .targets import TARGETS, quiet

EXECUTIONS = 300
PAST = sorted(path for path in CORPUS.glob("*/*") if path.parent.name in TARGETS)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_log():
    with quiet():
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read_and_damaged_ones_refused_with_a_reason(name):
    target = TARGETS[name]
    seeds = target.seeds()
    for data in seeds:
        target.one_input(data)
    mutator = Mutator(seeds, target.framing, seed=20261120)
    for _ in range(EXECUTIONS):
        target.one_input(mutator.next_input())


@pytest.mark.parametrize("path", PAST, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_broke_a_parser_does_so_no_more(path):
    target = TARGETS[path.parent.name]
    target.seeds()  # puts the other files in place
    target.one_input(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_seed_makes_the_same_inputs(name):
    target = TARGETS[name]
    seeds = target.seeds()
    first, second, other = (Mutator(seeds, target.framing, seed) for seed in (1, 1, 2))
    made = [first.next_input() for _ in range(20)]
    assert made == [second.next_input() for _ in range(20)]
    assert made != [other.next_input() for _ in range(20)]
    assert len(set(made)) > 10


def test_it_runs_by_hand():
    command = [sys.executable, "-m", "tests.fuzz", "profile", "--seconds", "0.2", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "executions" in done.stdout and "seed 3: ok" in done.stdout


def test_an_input_that_breaks_a_target_is_saved_and_told_by_the_status(tmp_path, monkeypatch, capsys):
    from . import __main__ as runner
    from .targets import Broken, Target

    def one_input(data):
        raise Broken("always")

    monkeypatch.setattr(runner, "CORPUS", tmp_path)
    monkeypatch.setitem(runner.TARGETS, "broken", Target(one_input, lambda: [b"{}"]))
    assert runner.run("broken", seconds=5, seed=1) == 1
    assert len(list((tmp_path / "broken").iterdir())) == 1  # for pytest to replay
    assert "1 executions" in capsys.readouterr().out
