"""What several commands ask for in the same words: counts and memory sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zinfer.errors import OptionError


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def memory(text: str) -> tuple[str | int, str]:
    """DEVICE=SIZE for argparse, the device "cpu" or a number; the size is for zinfer to parse."""
    device, equals, size = text.partition("=")
    if not (device and equals and size):
        raise argparse.ArgumentTypeError(f"{text!r}: write the device and the size, for example cpu=3GiB")
    return (int(device) if device.isdecimal() else device), size


def check_memory(given: Sequence[tuple[str | int, str]]) -> None:
    """Raises OptionError where --max-memory names a device twice."""
    devices = [device for device, _ in given]
    if len(set(devices)) < len(devices):
        raise OptionError(f"--max-memory names a device twice: {devices}")
