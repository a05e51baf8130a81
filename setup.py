"""Builds the two native modules; everything else is declared in pyproject.toml.

A build that fails costs speed, not the install: zinfer.aio and zinfer.pinned have portable implementations, and one
line on stderr says so. ZINFER_REQUIRE_BUILD=1 makes it an error, for those who build to ship or to test.
liburing is optional: with its header and library present the io_uring backend is compiled in, without
them libaio or threads serve, and `zinfer doctor` says which it is.
ZINFER_SANITIZE=address|undefined|thread builds with that sanitizer (used by the native tests).
"""

import os
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup


def has_liburing() -> bool:
    """Whether a program that uses liburing compiles and links here."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <liburing.h>\nint main() { io_uring r; return io_uring_queue_init(2, &r, 0); }\n"
        )
        command = [compiler, str(source), "-o", str(Path(folder, "probe")), "-luring"]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def extensions() -> list[Pybind11Extension]:
    flags = ["-O2", "-g", "-Wall", "-Wextra", "-pthread", "-fvisibility=hidden"]
    links = ["-pthread"]
    if sanitizer := os.environ.get("ZINFER_SANITIZE"):
        flags += [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
        links += [f"-fsanitize={sanitizer}"]
    uring = has_liburing()
    print(f"zinfer: io_uring backend {'on' if uring else 'off (liburing not found)'}", file=sys.stderr)
    aio = sorted(set(glob("csrc/aio/*.cpp")) - (set() if uring else {"csrc/aio/io_uring_backend.cpp"}))
    common = {"cxx_std": 17, "extra_compile_args": flags, "extra_link_args": links, "include_dirs": ["csrc"]}
    return [
        Pybind11Extension(
            "zinfer.aio._native",
            aio,
            define_macros=[("ZINFER_HAS_LIBURING", "1" if uring else "0")],
            libraries=["uring"] if uring else [],
            depends=glob("csrc/aio/*.h"),
            **common,
        ),
        Pybind11Extension(
            "zinfer.pinned._native",
            sorted(glob("csrc/pinned/*.cpp")),
            libraries=["dl"],
            depends=glob("csrc/pinned/*.h"),
            **common,
        ),
    ]


class BuildWhatCanBeBuilt(build_ext):
    """Goes on without the modules that do not compile here."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # compilers fail in ways of their own: distutils, pybind11 and OS errors
            if os.environ.get("ZINFER_REQUIRE_BUILD") == "1":
                raise
            self.extensions = []
            reason = " ".join(str(error).split())
            print(
                f"zinfer: WARNING: the compiled modules could not be built ({type(error).__name__}: {reason}); zinfer "
                "will read files with Python code, more slowly and without io_uring or page-locking. Remedy: install "
                "g++ (and liburing-dev for io_uring), then install zinfer again",
                file=sys.stderr,
            )


ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWhatCanBeBuilt})
