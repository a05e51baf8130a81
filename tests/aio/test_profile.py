from __future__ import annotations

import json

import pytest

from zinfer.aio.block_device import BlockDevice
from zinfer.aio.profile import Profile, load_profile, profile_path, save_profile

DRIVE = BlockDevice("Fast_9000-S1", "nvme0n1")
PROFILE = Profile("libaio", 1 << 20, 32, 4, 3.3e9, None, "2026-11-20T21:00:00")


def test_a_saved_profile_comes_back():
    assert load_profile(DRIVE) is None
    path = save_profile(DRIVE, PROFILE)
    assert path == profile_path(DRIVE)
    assert load_profile(DRIVE) == PROFILE
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_a_later_profile_replaces_the_earlier():
    save_profile(DRIVE, PROFILE)
    later = Profile("io_uring", 4 << 20, 8, 4, 3.4e9, 1.1e9, "2026-11-21T21:00:00")
    save_profile(DRIVE, later)
    assert load_profile(DRIVE) == later


def changed(**fields: object) -> str:
    document = json.loads(profile_path(DRIVE).read_text())
    document["profile"] |= fields
    return json.dumps(document)


@pytest.mark.parametrize(
    "fields",
    [
        {"backend": "sorcery"},
        {"depth": 0},
        {"depth": 10**9},
        {"depth": True},
        {"block_bytes": 3 << 20},
        {"block_bytes": 2048},
        {"block_bytes": "4MiB"},
        {"workers": -1},
        {"read_rate": "fast"},
        {"read_rate": float("nan")},
        {"read_rate": -1.0},
        {"measured": 7},
        {"surprise": 1},
    ],
)
def test_a_profile_with_a_senseless_value_is_reported_and_not_used(fields, caplog):
    path = save_profile(DRIVE, PROFILE)
    path.write_text(changed(**fields))
    assert load_profile(DRIVE) is None
    assert str(path) in caplog.text and "run aio_bench again" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"schema": 2}', '{"schema": 1}', "[" * 100_000, "\x00"]
)
def test_a_profile_that_is_no_profile_is_reported_and_not_used(text, caplog):
    path = save_profile(DRIVE, PROFILE)
    path.write_text(text)
    assert load_profile(DRIVE) is None
    assert "run aio_bench again" in caplog.text


def test_a_profile_that_is_not_text_is_not_used():
    path = save_profile(DRIVE, PROFILE)
    path.write_bytes(b"\xff\xfe\x00")
    assert load_profile(DRIVE) is None
