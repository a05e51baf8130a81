"""The command `aio_bench`: its tables, its files, the profile it keeps, what it refuses."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from zinfer.aio.block_device import block_device_of
from zinfer.aio.profile import load_profile
from zinfer.cli import aio_bench_main

QUICK = ("--size", "16MiB", "--seconds", "0.3", "--rounds", "1")
NARROW = ("--block", "1MiB", "--depth", "4", "--threads", "2")


@pytest.fixture
def bench(capsys):
    """Carry out `aio_bench` in this process; its exit status, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        status = aio_bench_main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


def direct(folder) -> bool:
    from zinfer.aio import File

    path = folder / "probe"
    path.write_bytes(bytes(1 << 20))
    file = File(str(path))
    file.close()
    path.unlink()
    return file.direct


def test_a_sweep_prints_a_table_for_reads_and_writes_and_the_best(bench, tmp_path, nothing_left):
    status, out, _ = bench(tmp_path, *QUICK, *NARROW)
    assert status == 0
    for text in (
        "reads, median",
        "writes, median",
        "GB/s",
        "CPU s/GB",
        "p99 ms",
        "best for reads",
        "best for writes",
    ):
        assert text in out
    assert out.count("<- best") == 2
    assert "not kept as a profile" in out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def telling(monkeypatch):
    """Let a small file decide about a profile."""
    monkeypatch.setattr("zinfer.cli.aio_bench.SMALLEST_FOR_PROFILE", 16 << 20)


def test_a_full_sweep_is_kept_as_the_profile_of_the_drive(bench, tmp_path, telling):
    if not direct(tmp_path):
        pytest.skip("profiles are of direct reads")
    device = block_device_of(str(tmp_path))
    assert load_profile(device) is None
    status, out, _ = bench(tmp_path, *QUICK, "--read")
    assert status == 0 and f"kept as the profile of {device.name}" in out
    profile = load_profile(device)
    assert profile.read_rate > 0 and profile.write_rate is None
    assert f"{profile.backend}, blocks of" in out
    # The rate that is kept is of reads into more memory than a cache holds.
    assert f"as zinfer reads ahead: {profile.read_rate / 1e9:.2f} GB/s" in out


def test_a_small_file_decides_nothing(bench, tmp_path):
    status, out, _ = bench(tmp_path, *QUICK, "--read")
    assert (status == 0 and "not kept as a profile: 16 MiB are too few" in out) or not direct(tmp_path)
    assert load_profile(block_device_of(str(tmp_path))) is None


def test_what_was_measured_is_told_whatever_fails_afterwards(bench, tmp_path, telling, monkeypatch):
    if not direct(tmp_path):
        pytest.skip("profiles are of direct reads")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nope")
    status, out, err = bench(tmp_path, *QUICK, "--read")
    assert status == 1 and "best for reads" in out
    assert "the profile was not kept" in err and "/proc/nope" in err


def test_what_fio_fails_at_is_told_after_the_results(bench, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "fio"
    fake.write_text("#!/bin/sh\necho no such engine >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    status, out, err = bench(tmp_path, *QUICK, *NARROW, "--read", "--fio")
    assert status == 1 and "best for reads" in out and "no such engine" in err


def test_nothing_is_written_before_the_options_make_sense(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("zinfer.aio_bench.made_targets", None)  # not to be called
    for wrong in (["--depth", "0"], ["--block", "3MiB"], ["--rounds", "0"], ["--write", "--save"]):
        assert bench(tmp_path, *wrong)[0] == 2


def test_what_is_kept_can_be_asked_for_and_declined(bench, tmp_path):
    if not direct(tmp_path):
        pytest.skip("profiles are of direct reads")
    device = block_device_of(str(tmp_path))
    bench(tmp_path, *QUICK, "--read", "--no-save")
    assert load_profile(device) is None
    bench(tmp_path, *QUICK, *NARROW, "--save")
    profile = load_profile(device)
    assert (profile.block_bytes, profile.write_rate is not None) == (1 << 20, True)


def test_json_holds_every_measurement(bench, tmp_path):
    status, out, _ = bench(tmp_path, *QUICK, *NARROW, "--write", "--json")
    document = json.loads(out)
    assert status == 0 and list(document["best"]) == ["write"] and document["into_window"] is None
    assert {item["direction"] for item in document["measurements"]} == {"write"}
    assert all(item["bytes_per_second"] > 0 for item in document["measurements"])
    assert document["targets"][0]["device"] == block_device_of(str(tmp_path)).name


def test_several_drives_are_measured_together(bench, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    status, out, _ = bench(tmp_path / "a", "--drives", tmp_path / "b", *QUICK, *NARROW, "--read")
    assert status == 0 and out.count("16 MiB in") == 2


def test_a_named_file_is_read_and_nothing_is_written(bench, tmp_path):
    path = tmp_path / "model.safetensors"
    content = os.urandom(5 << 20)
    path.write_bytes(content)
    status, out, _ = bench("--file", path, *QUICK[2:], *NARROW)
    assert status == 0 and "yours, only read" in out and "writes" not in out
    assert path.read_bytes() == content
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_a_picture_is_drawn(bench, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, _ = bench(tmp_path, *QUICK, *NARROW, "--plot", tmp_path / "sweep.png")
    assert status == 0 and "drawn to" in out
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_runs_beside_it(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("zinfer.aio_bench.fio.ROUNDS", 1)
    monkeypatch.setattr("zinfer.aio_bench.fio.SECONDS", 1.0)
    threads = ("--block", "1MiB", "--threads", "2", "--backend", "threads")
    status, out, _ = bench(tmp_path, *QUICK, *threads, "--read", "--fio", "--json")
    [compared] = json.loads(out)["fio"]
    assert status == 0
    assert compared["ratio"] == pytest.approx(
        compared["bytes_per_second"] / compared["fio_bytes_per_second"], rel=1e-6
    )


def test_without_fio_it_says_how_to_get_it(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = bench(tmp_path, "--fio")
    assert status == 2 and "apt-get install fio" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["/absent"], "no such folder"),
        (["--file", "/absent"], "/absent"),
        (["--file", "/etc/hostname", "--write"], "--write has no effect"),
        (["--file", "/etc/hostname", "--size", "1GiB"], "--size has no effect"),
        (["--block", "3MiB"], "power of two"),
        (["--depth", "0"], "depth is 0"),
        (["--threads", "9999"], "threads is 9999"),
        (["--size", "1KiB"], "at least"),
        (["--size", "lots"], "not a memory size"),
        (["--backend", "magic"], "magic"),
        (["--plot", "x.jpeg"], ".png"),
        (["--drives", "."], "same folder twice"),
        (["--write", "--save"], "--save has no effect"),
        (["--sise", "1GiB"], "--sise"),
        (["--backend", "io_uring", "--threads", "3"], "--threads has no effect"),
        (["--backend", "threads", "--depth", "3"], "--depth has no effect"),
        (["--plot", "absent/x.png"], "--plot"),
        (["--seconds", "nan"], "seconds"),
    ],
)
def test_what_makes_no_sense_is_refused(bench, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    status, out, err = bench(*arguments)
    assert status in (1, 2) and out == ""
    assert text in err and err.startswith("aio_bench: error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_named_as_the_folder_is_not_touched(bench, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"precious")
    status, _, err = bench(path)
    assert status == 2 and "--file" in err
    assert path.read_bytes() == b"precious"


def test_help_and_version(bench):
    status, out, _ = bench("--help")
    assert status == 0 and "--fio" in out
    assert bench("--version")[1].startswith("zinfer ")
