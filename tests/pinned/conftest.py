"""Both pools, compiled and portable, behind the names that the tests use."""

import pytest

import zinfer.pinned
from zinfer.pinned import portable

COMPILED = pytest.param(
    "compiled", marks=pytest.mark.skipif(not zinfer.pinned.COMPILED, reason="the compiled pool is not in use")
)


def pytest_generate_tests(metafunc):
    """Both, but in a module that says COMPILED_ONLY: page-locking and NUMA placement are the compiled pool's."""
    if hasattr(metafunc.module, "Pool") and not getattr(metafunc.module, "COMPILED_ONLY", False):
        metafunc.parametrize("implementation", [COMPILED, "portable"], indirect=True)


@pytest.fixture(autouse=True)
def implementation(request, monkeypatch):
    """ "compiled" or "portable": whose `Pool` that of the test's module is; "" where there is only one."""
    chosen = getattr(request, "param", "")
    if chosen == "portable":
        monkeypatch.setattr(request.module, "Pool", portable.Pool)
        monkeypatch.setenv("ZINFER_PORTABLE", "1")  # for the interpreters that a test starts
    return chosen
