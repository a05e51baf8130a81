"""The names zinfer offers, and the order of its layers: each imports only what lies below it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zinfer
from tests.interpreters import LIBRARIES_ONLY

ROOT = Path(zinfer.__file__).parent
PUBLIC = [
    "BudgetError",
    "CheckpointChangedError",
    "CheckpointError",
    "ClosedError",
    "DriveError",
    "OptionError",
    "OutOfMemoryError",
    "Plan",
    "ReadOnlyError",
    "Report",
    "StoreError",
    "ZinferError",
    "__version__",
    "plan",
    "run",
]

# From the bottom up. A module may import from its own layer and from those before it.
LAYERS = [
    "_version",
    "errors",
    "wording",
    "timeline",
    "pinned",
    "aio",
    "aio_bench",
    "weights",
    "device",
    "coordinator",
    "planner",
    "experts",
    "store",
    "locate",
    "parts",
    "budgets",
    "opening",
    "streaming",
    "kv_offload",
    "kv_cache",
    "residency",
    "relief",
    "caches_on_host",
    "decoding",
    "prefill",
    "synth",
    "outline",
    "pass_recorder",
    "dry_run",
    "device_probe",
    "cpu_probe",
    "hardware_cache",
    "hardware_probe",
    "options",
    "plan_task",
    "planning",
    "report",
    "runtime",
    "attach",
    "run",
    "zinfer",  # the package itself: what `import zinfer` offers
    "doctor",
    "cli",
    "__main__",
]
# Layers that take less than all that lies below them: module names, or packages with all they hold.
ONLY = {
    "_version": (),
    "errors": (),
    "wording": (),
    "timeline": ("errors",),
    "pinned": ("errors",),
    "aio": ("errors", "pinned"),
    "aio_bench": ("errors", "pinned", "aio"),
    "weights": ("errors",),
    "planner": ("errors", "wording"),
    "store": (
        "errors",
        "pinned",
        "aio",
        "weights.checkpoint",
        "weights.safetensors_header",
        "weights.packed",
    ),
    "report": ("timeline.sweeps", "wording"),
}


def modules() -> dict[str, Path]:
    """Dotted name below zinfer -> file; the package itself is "zinfer"."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "zinfer"] = path
    return found


def statements(body: list[ast.stmt], *, at_import: bool) -> Iterator[ast.stmt]:
    """Statements at any depth, those for type checkers left out; `at_import`: not those inside functions."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            for child in getattr(node, field, []):
                yield from statements([child], at_import=at_import)


def imports(name: str, path: Path, *, at_import: bool) -> set[str]:
    """Modules of zinfer that `path` imports, as in modules(); compiled ones by the package they lie in."""
    known = modules()
    wanted = set()
    for node in statements(ast.parse(path.read_text()).body, at_import=at_import):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            base = node.module or ""
            wanted |= {
                f"{base}.{alias.name}" if known_below(base, alias.name) else base for alias in node.names
            }
    found = set()
    for dotted in wanted:
        if dotted == "zinfer":
            found.add("zinfer")
        elif dotted.startswith("zinfer."):
            inner = dotted.removeprefix("zinfer.")
            found.add(inner if inner in known else inner.rpartition(".")[0])
    return found - {name}


def known_below(base: str, name: str) -> bool:
    """Whether `from base import name` imports a module."""
    return f"{base}.{name}".removeprefix("zinfer.") in modules()


def layer_of(name: str) -> str:
    return name.partition(".")[0]


def test_the_public_names_are_these_and_no_others():
    assert zinfer.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    assert getattr(zinfer, name) is not None


def test_every_public_error_is_a_zinfer_error():
    for name in PUBLIC:
        if name.endswith("Error"):
            assert issubclass(getattr(zinfer, name), zinfer.ZinferError)


@pytest.mark.parametrize("package", [name for name, path in modules().items() if path.name == "__init__.py"])
def test_what_a_package_lists_in_all_it_has(package):
    module = importlib.import_module("zinfer" if package == "zinfer" else f"zinfer.{package}")
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


def test_every_module_belongs_to_a_layer():
    strangers = {layer_of(name) for name in modules()} - set(LAYERS)
    assert not strangers, f"give {strangers} a place in LAYERS"


@pytest.mark.parametrize("name", modules())
def test_imports_go_only_downward(name):
    layer = layer_of(name)
    allowed = ONLY.get(layer, tuple(LAYERS[: LAYERS.index(layer)]))
    for imported in imports(name, modules()[name], at_import=False):
        inside = layer_of(imported) == layer
        below = any(imported == part or imported.startswith(f"{part}.") for part in allowed)
        assert inside or below, f"{name} imports {imported}, but {layer} may import only {allowed}"


def test_what_a_layer_may_import_lies_below_it():
    for layer, allowed in ONLY.items():
        for part in allowed:
            assert LAYERS.index(layer_of(part)) < LAYERS.index(layer)


def test_no_modules_import_each_other_in_a_circle():
    """Packages import their modules, so a circle is looked for between modules that are not packages too."""
    files = modules()
    graph = {name: imports(name, path, at_import=True) for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular import: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_io_library_and_the_pool_need_no_torch():
    """Nor does what measures a drive. Their own tests start interpreters by the dozen, and rely on it."""
    code = (
        "import zinfer.aio.drives, zinfer.aio.portable, zinfer.aio_bench, zinfer.pinned.portable\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", LIBRARIES_ONLY + code]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
