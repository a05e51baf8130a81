"""Where the native tests build."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what compile_program() makes: what two programs have in common is compiled once."""
    return tmp_path_factory.mktemp("objects")
