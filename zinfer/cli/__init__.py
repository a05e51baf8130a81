"""The `zinfer` command and `aio_bench`: `zinfer.cli.main(argv)` and `aio_bench_main(argv)` return the exit status."""

from __future__ import annotations

from zinfer.cli.entry import aio_bench_main, main

__all__ = ["aio_bench_main", "main"]
