"""The file that keeps what was measured of this machine: a record for each drive, and one for each device.

`$XDG_CACHE_HOME/zinfer/hardware.json`, by default `~/.cache/zinfer/hardware.json`. It may be deleted at any time.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger("zinfer")

SCHEMA = 2
Section = Literal["drives", "devices"]
SECTIONS: tuple[Section, ...] = ("drives", "devices")


def cache_path() -> Path:
    """Where the figures are, or would be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "zinfer", "hardware.json")


def load(section: Section) -> dict[str, Any]:
    """The records of `section`; none, and a warning, where the file is damaged or of another zinfer."""
    return _document()[section]


def save(section: Section, key: str, record: dict[str, Any]) -> None:
    """Keep `record`; a file that cannot be written costs the next plan a few seconds, no more."""
    path = cache_path()
    document = _document()
    document[section][key] = record
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            try:
                file.write(json.dumps({"schema": SCHEMA, **document}, indent=2) + "\n")
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        logger.warning("%s: not kept: %s", path, error.strerror)


def _document() -> dict[Section, dict[str, Any]]:
    path = cache_path()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {section: document.get(section, {}) for section in SECTIONS}
        if document["schema"] != SCHEMA or not all(isinstance(records, dict) for records in found.values()):
            raise ValueError(f"schema {document['schema']!r}")
    except (FileNotFoundError, NotADirectoryError):
        return {section: {} for section in SECTIONS}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s: not used (%s: %s); measuring again", path, type(error).__name__, error)
        return {section: {} for section in SECTIONS}
    return found
