"""The common parts of the benchmarks: figures, drives, results files."""

import json
import os

import pytest

from benchmarks import BenchmarkError, drive
from benchmarks.bench import interleave
from benchmarks.drive import Drive, Traffic, drive_of, process_traffic
from benchmarks.report import Requirement, Result, Spread, command, table, write


@pytest.fixture
def here(tmp_path):
    try:
        return drive_of(str(tmp_path))
    except BenchmarkError as error:
        pytest.skip(str(error))


def test_a_spread_shows_its_median_and_range():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([3e9, 1e9, 2e9]).text(1e9, 1) == "2.0 (1.0-3.0)"


def test_a_spread_of_equal_figures_shows_one():
    assert Spread.of([2.0, 2.0]).text() == "2.00"


def test_a_requirement_is_met_on_its_own_side_of_the_bound():
    assert Requirement("share", 0.9, 0.85, at_least=True).met
    assert not Requirement("ratio", 0.9, 0.5, at_least=False).met
    assert Requirement("written", 0, 0, at_least=False).met


def test_the_order_of_the_tools_turns_round_every_round():
    assert interleave(["a", "b"], 3) == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_a_command_can_be_pasted_into_a_shell():
    assert (
        command("benchmarks.versus", ["--checkpoint", "a b"])
        == "python -m benchmarks.versus --checkpoint 'a b'"
    )


def test_a_drive_counts_what_is_written_to_it(here, tmp_path):
    before = process_traffic().written, here.traffic().written
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    assert process_traffic().written - before[0] >= 1 << 20
    assert here.traffic().written - before[1] >= 1 << 20


def test_a_filesystem_without_a_drive_is_refused_by_name():
    with pytest.raises(BenchmarkError, match="does not count"):
        drive_of("/proc")


def test_a_drive_that_has_gone_is_an_error():
    with pytest.raises(BenchmarkError, match="gone"):
        Drive("no-such-drive", "ext4").traffic()


def test_a_file_name_tells_the_kind_of_drive():
    assert [Drive(name, "ext4").kind for name in ("nvme0n1p2", "vda1", "sdb", "rbd0")] == [
        "nvme",
        "virtio",
        "scsi",
        "drive",
    ]


def test_traffic_is_a_difference_of_readings():
    assert Traffic(5, 3) - Traffic(2, 1) == Traffic(3, 2)
    assert drive.SECTOR_BYTES == 512


def test_a_results_file_opens_with_hardware_versions_and_command(here, tmp_path):
    result = Result(
        name="demo",
        drive=here,
        settings={"rounds": 1},
        rounds=[{"tool": {"seconds": 1.0}}],
        figures={"seconds": Spread.of([1.0])},
        requirements=[Requirement("seconds", 1.0, 2.0, at_least=False)],
        body=table(["figure", "tool"], [["seconds", "1.00"]]),
        load_average=0.5,
    )
    to_json, to_markdown = write(result, "python -m benchmarks.demo", str(tmp_path / "out.json"))
    content = json.loads(to_json.read_text())
    assert content["requirements"][0]["met"] is True
    assert content["figures"]["seconds"]["median"] == 1.0
    text = to_markdown.read_text()
    positions = [
        text.index(word) for word in ("- cpu:", "- drive:", "- versions:", "- command:", "| figure |")
    ]
    assert positions == sorted(positions)
    assert "| seconds | 1 | <= 2 | yes |" in text
