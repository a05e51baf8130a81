"""Benchmarks: each is a module with a command line, run from the repository's root (see README.md)."""


class BenchmarkError(Exception):
    """A benchmark cannot run here, or one of its processes failed; the message says why and what to do."""
