"""The I/O benchmark from its command line to its results file, beside fio and a stand-in for aio_handle."""

import json
import shutil
import stat
import sys

import pytest

from benchmarks import BenchmarkError, aio, huge_pages
from benchmarks.aio_handle import AioHandle, HandleSetting
from benchmarks.drive import drive_of
from zinfer.aio_bench import Setting, made_targets
from zinfer.aio_bench.measurement import Trial

MIB = 1 << 20

STAND_IN = """#!{python}
import json, os, sys, time
print(json.dumps({{"version": "0"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "path" in asked:
        file, size, buffer = os.open(asked["path"], os.O_RDWR), asked["size"], bytearray(asked["buffer_bytes"])
        print(json.dumps({{"ready": True}}), flush=True)
        continue
    started = time.perf_counter()
    moved = (os.preadv if asked["direction"] == "read" else os.pwritev)(file, [buffer], 0)
    answer = {{"nbytes": moved, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time()}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A "Python with deepspeed" that answers as the worker does, by plain reads and writes."""
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_aio_compares_with_fio_and_with_aio_handle(tmp_path, stand_in, monkeypatch):
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    try:
        drive_of(str(tmp_path))
        with huge_pages.reserved(64 * MIB):
            pass
    except BenchmarkError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(aio, "SETTINGS", [Setting("threads", MIB, 2)])
    monkeypatch.setattr(aio, "WHOLE_BYTES", 8 * MIB)
    monkeypatch.setattr(aio, "FIO_MEMORY", 64 * MIB)
    out = tmp_path / "aio.json"
    sizes = ["--size", "32MiB", "--rounds", "1", "--seconds", "0.2", "--patience", "0"]
    aio.main(["--folder", str(tmp_path), *sizes, "--deepspeed-python", stand_in, "--json", str(out)])
    result = json.loads(out.read_text())
    names = [item["name"] for item in result["requirements"]]
    assert names == [
        *("read, threads, 1 MiB x 2: bandwidth over fio's", "read, threads, 1 MiB x 2: CPU a GB over fio's"),
        *(
            "write, threads, 1 MiB x 2: bandwidth over fio's",
            "write, threads, 1 MiB x 2: CPU a GB over fio's",
        ),
        *("read: bandwidth over aio_handle's", "write: bandwidth over aio_handle's"),
    ]
    assert all(item["fio_huge_pages"] for item in result["figures"]["fio"])
    assert out.with_suffix(".md").read_text().startswith("# aio\n")


@pytest.mark.parametrize("direction", ["read", "write"])
def test_long_transfers_are_counted_whole(tmp_path, monkeypatch, direction):
    monkeypatch.setattr(aio, "WHOLE_BYTES", 4 * MIB)
    with made_targets([str(tmp_path)], 16 * MIB) as [target]:
        trial = aio.move_whole(target, direction, 0.05)
    assert trial.nbytes % (4 * MIB) == 0 and trial.rate > 0


def test_the_peer_is_shown_at_its_best(tmp_path, stand_in):
    with made_targets([str(tmp_path)], 16 * MIB) as [target], AioHandle(stand_in) as handle:
        assert isinstance(handle.best(target, "read", MIB, 0.01), HandleSetting)
        handle.use(target, HandleSetting(MIB, 8, 1), 2 * MIB)
        trial = handle.run("read", 0.01)
    assert isinstance(trial, Trial) and trial.nbytes == 2 * MIB


def test_a_worker_that_cannot_start_says_why():
    with pytest.raises(BenchmarkError, match="deepspeed"):
        AioHandle(sys.executable)


def test_reserved_huge_pages_are_given_back():
    before = huge_pages.RESERVED.read_text()
    try:
        with huge_pages.reserved(16 * MIB):
            pass
    except BenchmarkError as error:
        pytest.skip(str(error))
    assert huge_pages.RESERVED.read_text() == before
