"""Hardware files: what ships is complete, and what makes no sense is refused by the field's name."""

from __future__ import annotations

import json
import math

import pytest

from tests.planner.machines import CPU, GPU, cpu, gpu
from zinfer.errors import OptionError
from zinfer.planner.hardware import RANGES, hardware_from, load_hardware, published_names


def test_the_profiles_that_ship_are_these():
    assert published_names() == ("a6000", "h200", "rtx4090")


@pytest.mark.parametrize("name", ["a6000", "h200", "rtx4090"])
def test_every_number_of_a_shipped_profile_has_a_source(name):
    hardware = load_hardware(name)
    given = {field for field in RANGES if getattr(hardware, field)}
    assert given | {"matmul"} == set(hardware.sources)
    assert hardware.has_device


@pytest.mark.parametrize("document", [CPU, GPU])
def test_a_file_is_read_back_as_it_was_written(document, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document))
    hardware = load_hardware(str(path))
    assert hardware_from(hardware.as_dict(), "again") == hardware
    assert hardware.name == document["name"]


@pytest.mark.parametrize("field", ["drive_read", "host_memory", "host_bandwidth", "device_memory", "matmul"])
def test_a_missing_field_is_named(field):
    document = {key: value for key, value in CPU.items() if key != field}
    with pytest.raises(OptionError, match=f"{field}.*missing"):
        hardware_from(document, "f.json")


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e30, "3", None, True, [1]])
@pytest.mark.parametrize("field", ["drive_read", "host_memory", "host_bandwidth"])
def test_an_absurd_number_is_named_with_what_is_plausible(field, value):
    with pytest.raises(OptionError, match=f"f.json: field '{field}'.*plausible is"):
        hardware_from(CPU | {field: value}, "f.json")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({}, "dtypes to points"),
        ({"int4": [[1, 1e12]]}, "int4"),
        ({"float32": []}, "no list of points"),
        ({"float32": [[1, math.nan]]}, "is no point"),
        ({"float32": [[1, 0]]}, "is no point"),
        ({"float32": [[0, 1e12]]}, "is no point"),
        ({"float32": [[1.5, 1e12]]}, "is no point"),
        ({"float32": [[8, 1e12], [1, 1e12]]}, "do not rise"),
        ("fast", "'fast'"),
    ],
)
def test_a_curve_that_makes_no_sense_is_refused(value, complaint):
    with pytest.raises(OptionError, match=f"'matmul'.*{complaint}"):
        hardware_from(CPU | {"matmul": value}, "f.json")


def test_a_device_has_memory_bandwidth_and_a_bus_or_none_of_them():
    with pytest.raises(OptionError, match="host_to_device is 0 but device_memory is not"):
        gpu(host_to_device=0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"drive_speed": 1e9}, "unknown field 'drive_speed'"),
        ({"name": " "}, "field 'name'"),
        ({"sources": {"drive_read": 5}}, "field 'sources'"),
        ({"efficiency": 1.5}, "field 'efficiency'"),
        ({"operator_seconds": 1.0}, "field 'operator_seconds'"),
    ],
)
def test_other_faults_are_named_too(changes, complaint):
    with pytest.raises(OptionError, match=complaint):
        cpu(**changes)


@pytest.mark.parametrize("text", ["", "[]", "{", '"a6000"', "[" * 100_000])
def test_a_file_that_holds_no_object_is_refused(text, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(OptionError, match=r"f\.json"):
        load_hardware(str(tmp_path / "f.json"))


def test_an_unknown_name_lists_those_there_are(tmp_path):
    with pytest.raises(OptionError, match="a6000, h200, rtx4090"):
        load_hardware(str(tmp_path / "b200.json"))


def test_the_rate_between_points_lies_between_theirs_and_is_level_beyond_the_last():
    machine = cpu()
    assert machine.flop_rate("float32", 1) == pytest.approx(1e10)
    assert machine.flop_rate("float32", 4) == pytest.approx(4e10)
    assert machine.flop_rate("float32", 64) == pytest.approx(math.sqrt(1.6e11 * 4e11))
    assert machine.flop_rate("float32", 1 << 20) == pytest.approx(4e11)


def test_a_published_peak_counts_by_its_efficiency_and_a_dtype_without_a_curve_as_float32():
    assert gpu().flop_rate("float32", 64) == pytest.approx(5e12)
    assert gpu().flop_rate("bfloat16", 64) == pytest.approx(5e12)


def test_bandwidth_is_that_of_the_memory_that_computes_unless_measured_apart():
    assert cpu().bandwidth("copy") == cpu().bandwidth("matmul") == 2e10
    assert gpu().bandwidth("attention") == 1e12
    assert cpu(copy_bandwidth=5e9).bandwidth("copy") == 5e9
    assert cpu(copy_bandwidth=5e9, attention_bandwidth=7e9).bandwidth("attention") == 7e9
