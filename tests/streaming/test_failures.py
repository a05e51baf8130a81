"""What goes wrong while a model streams: the drive, the files, the user's Ctrl-C, other threads."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from running import (
    DEADLINE,
    IDS,
    check_device,
    run_tightly,
    survive_interrupts,
    tokens,
    window_in_use,
)
from surgery import SHARD

from tests import architectures
from zinfer.aio import Engine
from zinfer.errors import BudgetError, CheckpointChangedError, CheckpointError, ClosedError, DriveError

pytestmark = pytest.mark.usefixtures("nothing_left")
LOAD = 5  # reads that a tiny Llama takes before zinfer.run returns: its norms


@pytest.fixture
def llama(saved):
    """A saved tiny Llama and its greedy tokens in memory."""
    folder = saved("llama")
    return folder, tokens(architectures.build("llama"))


@pytest.fixture
def scripted(monkeypatch):
    """scripted(faults): models made from now on read through the scripted backend; load, then spoil."""

    def script(faults):
        monkeypatch.setattr(
            "zinfer.aio.drives.Engine", lambda backend, **options: Engine("faults", faults=faults, **options)
        )

    return script


# The drive


def until_it_works(model, expected, attempts=40):
    """Generate until no error comes; the errors, which are all DriveErrors."""
    errors = []
    while True:
        try:
            assert tokens(model) == expected
            return errors
        except DriveError as error:
            errors.append(error)
            assert len(errors) < attempts


@pytest.mark.parametrize("at", [LOAD, LOAD + 1, LOAD + 5, 20, 40])
def test_an_error_of_the_drive_is_one_exception_and_the_next_try_is_exact(at, llama, scripted):
    folder, expected = llama
    scripted([("ok",)] * at + [("error", errno.EIO)])
    with run_tightly(folder, spare=40_000) as model:
        errors = until_it_works(model, expected)
        assert len(errors) == 1
        error = errors[0]
        assert (error.path, error.errno, error.backend) == (f"{folder}/{SHARD}", errno.EIO, "faults")
        for part in (error.path, f"offset {error.offset}", os.strerror(errno.EIO)):
            assert part in str(error)
        check_device(model)
        assert tokens(model) == expected
    assert window_in_use(model) == 0, "regions are held beyond close(), by the kept error for one"


def test_a_drive_that_fails_again_and_again_recovers_when_it_does(llama, scripted):
    folder, expected = llama
    scripted([("ok",)] * LOAD + [("error", errno.EIO)] * 12)
    with run_tightly(folder, spare=40_000) as model:
        errors = until_it_works(model, expected)
        assert 1 <= len(errors) <= 12
        check_device(model)


@pytest.mark.parametrize(
    "faults",
    [
        [("short", 4096)] * 400,
        [("short", 1), ("ok",), ("short", 512), ("ok",)] * 60,
        [("error", errno.EAGAIN)] * 500,
        [("error", errno.EINTR), ("ok",)] * 100,
        [("delay", 0.002)] * 300,
        [("hold", 2), ("ok",), ("ok",)] * 100,
        [("hold", 3), ("delay", 0.002), ("short", 4096), ("error", errno.EAGAIN), ("ok",)] * 60,
    ],
    ids=lambda faults: str(faults[:3]),
)
def test_what_the_engine_repairs_no_one_notices(faults, llama, scripted):
    folder, expected = llama
    scripted(faults)
    with run_tightly(folder, spare=60_000) as model:
        assert tokens(model) == expected
        assert tokens(model) == expected
        check_device(model)


def test_a_read_that_ends_early_says_where(llama, scripted):
    folder, expected = llama
    scripted([("ok",)] * LOAD + [("zero",)])
    with run_tightly(folder) as model:
        (error,) = until_it_works(model, expected)
        assert error.errno == 0
        assert "ended early" in str(error)


def test_an_error_before_the_model_stands_leaves_nothing(llama, scripted):
    folder, _ = llama
    scripted([("error", errno.EIO)])
    with pytest.raises(DriveError, match="Input/output error"):
        run_tightly(folder)


def test_random_faults_never_give_a_wrong_token(llama, scripted):
    folder, expected = llama
    choices = [("ok",)] * 6 + [("short", 4096), ("error", errno.EAGAIN), ("hold", 2), ("delay", 0.001)]
    choices += [("error", errno.EIO), ("zero",)]
    for seed in range(4):
        chooser = random.Random(seed)
        scripted([("ok",)] * LOAD + [chooser.choice(choices) for _ in range(150)])
        with run_tightly(folder, spare=chooser.choice([0, 20_000, 60_000])) as model:
            until_it_works(model, expected, attempts=60)
            assert tokens(model) == expected
            check_device(model)


def test_an_error_in_an_operator_keeps_nothing_of_the_window(llama):
    """The traceback of the error, which a notebook keeps, holds no weight: the smallest window still works."""
    folder, expected = llama
    with run_tightly(folder) as model:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model.lm_head(torch.zeros(1, 3))
        assert tokens(model) == expected
        check_device(model)


def test_a_view_the_caller_keeps_stays_right_and_too_many_of_them_are_an_error(llama):
    folder, expected = llama
    with run_tightly(folder) as model:
        kept = model.lm_head.weight.T
        reference = architectures.build("llama").lm_head.weight.T
        began = time.monotonic()
        with pytest.raises(BudgetError, match=r"views kept by the caller.*raise max_memory"):
            model(IDS)
        assert time.monotonic() - began < 10, "a lone thread waits for nobody"
        assert torch.equal(kept, reference)
        del kept
        assert tokens(model) == expected


# The files


def after_some_tokens(folder, expected):
    model = run_tightly(folder)
    assert tokens(model) == expected
    return model


def test_a_file_written_to_while_it_is_streamed(llama):
    folder, expected = llama
    shard = Path(folder, SHARD)
    with after_some_tokens(folder, expected) as model:
        with open(shard, "r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(bytes(4096))
        for _ in range(2):
            with pytest.raises(CheckpointChangedError, match=r"altered while.*zinfer\.run again") as caught:
                tokens(model)
            assert str(shard) in str(caught.value)
        check_device(model)


def test_a_file_whose_modification_time_alone_changed(llama):
    folder, expected = llama
    with after_some_tokens(folder, expected) as model:
        os.utime(f"{folder}/{SHARD}")
        with pytest.raises(CheckpointChangedError, match=SHARD):
            tokens(model)


@pytest.mark.parametrize("left", [0, 5000, 300_000])
def test_a_file_truncated_while_it_is_streamed(left, llama):
    folder, expected = llama
    with after_some_tokens(folder, expected) as model:
        os.truncate(f"{folder}/{SHARD}", left)
        for _ in range(2):
            with pytest.raises((CheckpointChangedError, DriveError), match=SHARD):
                tokens(model)
        check_device(model)


def test_a_file_deleted_or_replaced_while_it_is_streamed_reads_as_it_was(llama):
    folder, expected = llama
    shard = Path(folder, SHARD)
    with after_some_tokens(folder, expected) as model:
        other = shard.with_name("other")
        other.write_bytes(bytes(shard.stat().st_size))
        other.replace(shard)
        assert tokens(model) == expected
        shard.unlink()
        assert tokens(model) == expected
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        run_tightly(folder)


# Ctrl-C

INTERRUPTED = """
    import os, signal, sys, threading, time
    import torch, transformers, zinfer
    from zinfer.aio import Engine
    import zinfer.aio.drives

    folder, budget, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    if delay:
        script = [("delay", delay)] * 40
        zinfer.aio.drives.Engine = lambda backend, **options: Engine("faults", faults=script, **options)
    ids = torch.tensor([[5, 17, 33, 101, 200, 9, 77]])
    settings = {"do_sample": False, "pad_token_id": 0}
    reference = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    expected = reference.generate(ids, max_new_tokens=6, **settings).tolist()
    model = zinfer.run(folder, offload="nvme", max_memory={"cpu": budget})
    print("ready", flush=True)
    try:
        model.generate(ids, max_new_tokens=100000, **settings)
        print("not interrupted")
    except KeyboardInterrupt:
        kept = sys.exc_info()[1]
        print("interrupted", flush=True)
    device = model.zinfer._streaming.coordinator.device
    device.window.check_integrity()
    print("exact" if model.generate(ids, max_new_tokens=6, **settings).tolist() == expected else "WRONG")
    device.window.check_integrity()
    device.drives.check_integrity()
    if sys.argv[4] == "close":
        model.zinfer.close()
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        names = [os.readlink(link) for link in links if os.path.lexists(link)]
        print("left", [name for name in names if name.endswith(".safetensors") or "io_uring" in name])
    print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("delay", "after", "end"), [(0.0, 0.15, "close"), (0.05, 0.33, "exit"), (0.05, 0.07, "close")]
)
def test_ctrl_c_surfaces_and_the_model_works_on(delay, after, end, llama):
    folder, _ = llama
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), folder, "190000", str(delay), end],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)
    assert out.splitlines() == ["interrupted", "exact", *(["left []"] if end == "close" else []), "done"], (
        errors
    )
    assert process.returncode == 0


def test_an_interrupt_at_any_moment_leaves_a_model_that_works(llama):
    """Signals in quick succession, whatever runs when they arrive; the error that is kept keeps no weight."""
    folder, expected = llama
    with run_tightly(folder) as model:
        survive_interrupts(model, expected)


# Threads


def in_threads(work, count):
    """Run work(number) in `count` threads; what each returned or raised."""
    results = {}

    def target(number):
        try:
            results[number] = work(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=target, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "a thread hangs"
    return [results[number] for number in range(count)]


@pytest.mark.parametrize("spare", [0, 30_000, 50_000, 100_000])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_threads_share_one_model_bit_for_bit(name, spare, saved):
    folder = saved(name)
    reference = architectures.build(name)
    prompts = [
        torch.randint(0, 256, (1, 3 + seed), generator=torch.Generator().manual_seed(seed))
        for seed in range(4)
    ]
    expected = [tokens(reference, prompt) for prompt in prompts]
    with run_tightly(folder, spare=spare) as model:
        for _ in range(2):
            assert in_threads(lambda number: tokens(model, prompts[number]), 4) == expected
            check_device(model)
        in_use = window_in_use(model)
        assert tokens(model, prompts[0]) == expected[0]
        assert window_in_use(model) <= max(in_use, model.zinfer.report().window_bytes)
    assert window_in_use(model) == 0


def test_a_thread_that_dies_half_way_disturbs_no_other(llama):
    folder, expected = llama

    def work(number):
        if number == 0:
            for _ in range(3):
                handle = model.model.layers[1].register_forward_pre_hook(die)
                try:
                    tokens(model)
                except LookupError:
                    pass
                finally:
                    handle.remove()
            raise LookupError("dead")
        return [tokens(model) for _ in range(3)]

    dying = threading.local()

    def die(*_):
        if getattr(dying, "number", None) == 0:
            raise LookupError("in mid-sweep")

    def marked(number):
        dying.number = number
        return work(number)

    with run_tightly(folder, spare=20_000) as model:
        first, *others = in_threads(marked, 3)
        assert isinstance(first, LookupError)
        assert others == [[expected] * 3] * 2
        check_device(model)
        assert tokens(model) == expected


def test_an_error_of_the_drive_reaches_only_the_threads_that_need_the_bytes(llama, scripted):
    folder, expected = llama
    scripted([("ok",)] * 30 + [("error", errno.EIO)] + [("ok",)] * 40 + [("error", errno.EIO)])
    with run_tightly(folder, spare=20_000) as model:

        def work(number):
            return len(until_it_works(model, expected))

        failures = in_threads(work, 3)
        assert sum(failures) >= 1
        check_device(model)


def test_closing_while_other_threads_generate_ends_them(llama):
    folder, _ = llama
    model = run_tightly(folder, spare=20_000)

    def work(number):
        if number == 0:
            time.sleep(0.1)
            return model.zinfer.close()
        return tokens(model, count=100_000)

    closed, *others = in_threads(work, 3)
    assert closed is None
    assert all(isinstance(error, ClosedError) for error in others), others


# Memory


def test_running_and_closing_again_and_again_leaks_nothing(llama):
    folder, expected = llama
    process = psutil.Process()

    def once():
        with run_tightly(folder, spare=20_000) as model:
            assert tokens(model, count=2) == [row[: IDS.shape[1] + 2] for row in expected]

    def measure():
        gc.collect()  # a closed engine keeps one eventfd until it goes
        return process.num_fds(), process.num_threads(), process.memory_info().rss

    for _ in range(5):
        once()
    before = measure()
    for _ in range(20):
        once()
    after = measure()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < 20 << 20, "resident memory grows"
