"""A model streamed from several drives at once: the same bits, every drive its share, one error when one fails."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
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

import zinfer
from tests import architectures
from zinfer.aio import Engine
from zinfer.errors import CheckpointChangedError, CheckpointError, DriveError, OptionError, StoreError
from zinfer.weights.packed import PAGE, STRIPE

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch):
    """Stripes of a page, so that every weight of a tiny model lies on every drive."""
    monkeypatch.setattr("zinfer.store.striped_file.STRIPE", PAGE)


@pytest.fixture
def folders(tmp_path):
    """folders(count) -> that many folders of one filesystem."""

    def make(count):
        made = [tmp_path / f"nvme{number}" for number in range(count)]
        for folder in made:
            folder.mkdir()
        return made

    return make


@pytest.fixture
def drives(tmp_path):
    """Folders on two devices."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second filesystem here")
    first = tmp_path / "nvme0"
    first.mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as second:
        yield [first, Path(second)]


@pytest.fixture
def loops(tmp_path):
    """Two ext4 filesystems, each on a loop device of its own; skips where that is not allowed."""
    tools = ("mkfs.ext4", "losetup", "mount", "umount")
    if os.geteuid() or not all(map(shutil.which, tools)):
        pytest.skip("loop devices take root and " + ", ".join(tools))
    devices, points = [], []
    try:
        for number in range(2):
            image, point = tmp_path / f"image{number}", tmp_path / f"loop{number}"
            with open(image, "wb") as file:
                file.truncate(64 << 20)
            point.mkdir()
            run("mkfs.ext4", "-q", "-F", image)
            devices.append(run("losetup", "--find", "--show", image))
            run("mount", devices[-1], point)
            points.append(point)
        yield points
    except NotAllowed as refusal:
        pytest.skip(f"no loop devices here: {refusal}")
    finally:
        for point in points:
            subprocess.run(["umount", str(point)], check=True, timeout=30)
        for device in devices:
            subprocess.run(["losetup", "--detach", device], check=True, timeout=30)


class NotAllowed(Exception):
    """The machine refuses to set a loop device up."""


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise NotAllowed(done.stderr.strip())
    return done.stdout.strip()


def drives_of(model):
    return model.zinfer._streaming.coordinator.device.drives


def members(model, folders):
    entry = os.path.basename(model.zinfer.report().source)
    return [folder / "zinfer-store" / entry / SHARD for folder in folders]


def check_against_memory(source, reference, folders, **options):
    """Streamed from `folders` at the smallest budget, the model gives the reference's logits, bit for bit."""
    with run_tightly(source, nvme_path=folders, **options) as model, torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
        assert tokens(model) == tokens(reference)
        check_device(model)
        report = model.zinfer.report()
        assert drives_of(model).bounce_bytes <= report.bounce_bytes
    assert window_in_use(model) == 0
    return report


# Exactness


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "gpt_oss"])
def test_logits_are_those_of_the_model_in_memory(name, count, saved, folders):
    folder = saved(name)
    check_against_memory(folder, architectures.reference(name, folder), folders(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_devices_have_an_engine_each_and_the_logits_are_the_same(dtype, saved, drives):
    folder = saved("llama", dtype)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    report = check_against_memory(folder, reference, drives)
    assert len(report.drives) == 2
    assert report.as_dict()["drives"] == report.drives
    for line in report.drives:
        assert line in str(report) and "depth" in line


def test_two_loop_devices_have_an_engine_each_and_the_logits_are_the_same(saved, loops):
    report = check_against_memory(saved("llama"), architectures.build("llama"), loops)
    names = [line.partition(":")[0] for line in report.drives]
    assert len(set(names)) == 2 and all(name.startswith("loop") for name in names)


def test_shards_of_real_stripes_are_exact_too(saved, drives, monkeypatch):
    monkeypatch.setattr("zinfer.store.striped_file.STRIPE", STRIPE)
    check_against_memory(saved("llama"), architectures.build("llama"), drives)


def test_folders_of_one_device_share_an_engine(saved, folders):
    with run_tightly(saved("llama"), nvme_path=folders(3)) as model:
        assert len(model.zinfer.report().drives) == 1


def test_bin_files_stream_striped(saved, folders):
    folder = saved("llama")
    reference = architectures.build("llama")
    torch.save(reference.state_dict(), Path(folder, "pytorch_model.bin"))
    os.unlink(f"{folder}/{SHARD}")
    check_against_memory(folder, reference, folders(2))


def test_a_live_model_streams_striped(drives):
    live, reference = architectures.build("llama"), architectures.build("llama")
    with run_tightly(live, nvme_path=drives) as model:
        assert tokens(model) == tokens(reference)
        assert len(model.zinfer.report().drives) == 2


def test_the_entry_streams_in_place_as_any_checkpoint(saved, drives):
    with run_tightly(saved("llama"), nvme_path=drives) as model:
        entry = model.zinfer.report().source
    with run_tightly(entry) as model:
        assert tokens(model) == tokens(architectures.build("llama"))
        assert model.zinfer.report().source == entry


def test_threads_share_a_model_on_two_drives(saved, drives):
    reference = architectures.build("llama")
    prompts = [torch.tensor([[5 + number, 17, 33]]) for number in range(3)]
    with (
        run_tightly(saved("llama"), spare=30_000, nvme_path=drives) as model,
        ThreadPoolExecutor(3) as pool,
    ):
        work = [pool.submit(tokens, model, prompt) for prompt in prompts]
        assert [each.result(DEADLINE) for each in work] == [tokens(reference, prompt) for prompt in prompts]
        check_device(model)


def test_it_is_written_once_wherever_it_lies(saved, folders):
    folder, both = saved("llama"), folders(2)
    with run_tightly(folder, nvme_path=both) as model:
        paths = members(model, both)
    written = [path.stat().st_mtime_ns for path in paths]
    with run_tightly(folder, nvme_path=[str(path) for path in both]) as model:
        assert model.zinfer.report().bytes_written == 0
    assert [path.stat().st_mtime_ns for path in paths] == written


# Speed


def test_each_drive_carries_half(saved, drives):
    with run_tightly(saved("llama"), nvme_path=drives) as model:
        tokens(model)
        one, other = (engine.stats["bytes_requested"] for _, engine in drives_of(model)._engines)
        total = model.zinfer.report().bytes_read
    assert min(one, other) > 0.45 * (one + other)
    assert total >= one + other


def test_members_on_one_device_are_read_alike(saved, folders, monkeypatch):
    three = folders(3)
    counts: dict[str, int] = {}
    with run_tightly(saved("llama"), nvme_path=three) as model:
        of_model = drives_of(model)
        original = of_model.read

        def counting(extents, keepalive=None, *, urgent=False):
            for file, _, length, _, _ in extents:
                counts[file.path] = counts.get(file.path, 0) + length
            return original(extents, keepalive, urgent=urgent)

        monkeypatch.setattr(of_model, "read", counting)
        tokens(model)
        assert counts.keys() == set(map(str, members(model, three)))
    assert min(counts.values()) > 0.28 * sum(counts.values())


# Failures


@pytest.fixture
def scripted(monkeypatch):
    """scripted(faults, ...): the first engine of models made from now on follows the first script, and so on."""

    def script(*scripts):
        made = iter(())

        def engine(backend, **options):
            nonlocal made
            faults = next(made, None)
            if faults is None:
                made = iter(scripts)
                faults = next(made)
            return Engine("faults", faults=faults, **options)

        monkeypatch.setattr("zinfer.aio.drives.Engine", engine)

    return script


def until_it_works(model, expected, attempts=60):
    errors = []
    while True:
        try:
            assert tokens(model) == expected
            return errors
        except DriveError as error:
            errors.append(error)
            assert len(errors) < attempts


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("at", [12, 30, 60])
def test_an_error_of_one_drive_is_one_exception_that_names_its_member(failing, at, saved, drives, scripted):
    expected = tokens(architectures.build("llama"))
    scripts = [[("ok",)], [("ok",)]]
    scripts[failing] = [("ok",)] * at + [("error", errno.EIO)]
    scripted(*scripts)
    with run_tightly(saved("llama"), spare=40_000, nvme_path=drives) as model:
        (error,) = until_it_works(model, expected)
        assert (error.path, error.errno) == (str(members(model, drives)[failing]), errno.EIO)
        check_device(model)
        assert tokens(model) == expected
    assert window_in_use(model) == 0, "regions are held beyond close(), by the kept error for one"


def test_random_faults_of_both_drives_never_give_a_wrong_token(saved, drives, scripted):
    expected = tokens(architectures.build("llama"))
    choices = [("ok",)] * 8 + [("short", 512), ("error", errno.EAGAIN), ("hold", 2), ("delay", 0.001)]
    choices += [("error", errno.EIO), ("zero",)]
    folder = saved("llama")
    for seed in range(3):
        chooser = random.Random(seed)
        scripted(*([("ok",)] * 12 + [chooser.choice(choices) for _ in range(150)] for _ in range(2)))
        with run_tightly(folder, spare=chooser.choice([0, 60_000]), nvme_path=drives) as model:
            until_it_works(model, expected)
            assert tokens(model) == expected
            check_device(model)


def test_an_interrupt_at_any_moment_leaves_a_model_that_works(saved, drives):
    expected = tokens(architectures.build("llama"))
    with run_tightly(saved("llama"), nvme_path=drives) as model:
        survive_interrupts(model, expected)


@pytest.mark.parametrize("number", [0, 1])
def test_a_member_truncated_while_it_is_streamed(number, saved, drives):
    with run_tightly(saved("llama"), nvme_path=drives) as model:
        tokens(model)
        member = members(model, drives)[number]
        os.truncate(member, 50_000)
        for _ in range(2):
            with pytest.raises((CheckpointChangedError, DriveError), match=str(member)):
                tokens(model)
        check_device(model)


@pytest.mark.parametrize("number", [0, 1])
def test_a_member_written_to_while_it_is_streamed(number, saved, folders):
    both = folders(2)
    with run_tightly(saved("llama"), nvme_path=both) as model:
        tokens(model)
        member = members(model, both)[number]
        with open(member, "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
        with pytest.raises(CheckpointChangedError, match=f"{member}: the file was altered"):
            tokens(model)
        check_device(model)


@pytest.mark.parametrize("lost", ["folder", "members"])
def test_a_drive_that_is_missing_is_named_and_the_checkpoint_can_be_written_anew(lost, saved, drives):
    folder = saved("llama")
    with run_tightly(folder, nvme_path=drives) as model:
        entry = model.zinfer.report().source
        gone = members(model, drives)[1].parent
    shutil.rmtree(gone)
    with pytest.raises(CheckpointError, match=f"mount {gone}, or pass nvme_path again"):
        zinfer.run(entry, offload="nvme")
    if lost == "members":
        gone.mkdir()
    else:
        with pytest.raises(StoreError, match=f"is the drive mounted at .*delete {entry} to have it"):
            zinfer.run(folder, nvme_path=drives, offload="nvme")
        shutil.rmtree(entry)
    with run_tightly(folder, nvme_path=drives) as model:
        assert model.zinfer.report().source == entry
        assert tokens(model) == tokens(architectures.build("llama"))


def test_the_folder_of_another_member_names_that_of_the_first(saved, drives, tmp_path):
    with run_tightly(saved("llama"), nvme_path=drives) as model:
        entry, other = model.zinfer.report().source, members(model, drives)[1].parent
    told = f"member 1 of a checkpoint striped over 2 drives; use the folder of member 0, {entry}"
    for options in ({}, {"nvme_path": tmp_path}, {"config": transformers.AutoConfig.from_pretrained(entry)}):
        with pytest.raises(CheckpointError, match=told):
            zinfer.run(other, **options)


# Options


def test_a_list_of_one_is_that_path(saved, tmp_path):
    with run_tightly(folder := saved("llama"), nvme_path=[tmp_path]) as model:
        assert model.zinfer.report().source == folder


@pytest.mark.parametrize(
    ("paths", "error", "part"),
    [
        ([], OptionError, "empty list"),
        ((), OptionError, "empty list"),
        ([".", "./"], OptionError, "twice"),
        ([".", 5], OptionError, "is not a path"),
        ([".", ""], OptionError, "is not a path"),
        (b"/tmp", OptionError, "is not a path"),
        ({"/tmp": 1}, OptionError, "is not a path"),
        ([".", "/absent/nvme1"], StoreError, "mkdir -p /absent/nvme1"),
        ([".", "/proc/version"], StoreError, "not a folder"),
    ],
    ids=repr,
)
def test_lists_that_name_no_drives(paths, error, part, tmp_path):
    """Before the model is even looked for."""
    with pytest.raises(error, match=part):
        zinfer.run(tmp_path / "absent", nvme_path=paths)


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_drives_have_no_effect_on_a_model_in_memory(offload, saved, folders):
    with pytest.raises(OptionError, match="nvme_path has no effect"):
        zinfer.run(saved("llama"), offload=offload, nvme_path=folders(2))


def test_transformers_refuses_a_striped_shard_cleanly(saved, folders):
    with run_tightly(saved("llama"), nvme_path=folders(2)) as model:
        entry = model.zinfer.report().source
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(entry)
