"""`python -m tests.fuzz TARGET`: exit status 0 when no input broke the target, 1 when one did (it is saved)."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .mutate import Mutator
from .targets import TARGETS, Target, quiet

CORPUS = Path(__file__).parent / "corpus"
SLOW = 5.0  # seconds that one input may take


def keep(name: str, data: bytes) -> Path:
    """Save a failure where pytest replays it."""
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def breaks(name: str, target: Target, data: bytes) -> bool:
    """Run one input; a failure is shown and saved."""
    began = time.monotonic()
    try:
        target.one_input(data)
    except Exception:
        traceback.print_exc()
    else:
        if time.monotonic() - began <= SLOW:
            return False
        print(f"took {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(f"saved {keep(name, data)} ({len(data)} bytes)", file=sys.stderr)
    return True


def run(name: str, seconds: float, seed: int) -> int:
    """Mutate until the time is up or an input breaks the target."""
    target = TARGETS[name]
    mutator = Mutator(target.seeds(), target.framing, seed)
    began, executions, broken = time.monotonic(), 0, False
    while not broken and time.monotonic() - began < seconds:
        broken = breaks(name, target, mutator.next_input())
        executions += 1
    took = time.monotonic() - began
    print(f"{name}: {executions} executions in {took:.0f} s, seed {seed}: {'BROKEN' if broken else 'ok'}")
    return int(broken)


def run_guided(name: str, seconds: float, seed: int) -> None:
    """The same under atheris, whose coverage picks what is mutated further; ends the process."""
    import atheris

    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="zinfer-guided-"))  # what atheris finds worth mutating
    for number, data in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(data)

    def one_input(data: bytes) -> None:
        if breaks(name, target, data):
            raise SystemExit(1)

    def mutate(data: bytes, most: int, choice: int) -> bytes:
        if choice % 2:
            return atheris.Mutate(data, most)
        return Mutator([data or b"{}"], target.framing, choice).next_input()[:most]

    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=1000000", str(folder)]
    atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=mutate)
    ours = [module for known, module in list(sys.modules.items()) if known.startswith("zinfer.")]
    for function in (
        value for module in ours for value in vars(module).values() if inspect.isfunction(value)
    ):
        if function.__module__.startswith("zinfer."):
            atheris.instrument_func(function)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="use atheris, which has to be installed")
    options = parser.parse_args()
    if options.guided and importlib.util.find_spec("atheris") is None:
        parser.error("--guided needs atheris: pip install atheris")
    with quiet():
        if options.guided:
            run_guided(options.target, options.seconds, options.seed)
        return run(options.target, options.seconds, options.seed)


if __name__ == "__main__":
    sys.exit(main())
