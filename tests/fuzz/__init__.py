"""Fuzzing of whatever parses bytes from disk.

    python -m tests.fuzz safetensors --seconds 60 --seed 1

runs one target of `targets.TARGETS` on mutations of valid files. An input that breaks it is saved; one kept under
`corpus/TARGET/` is replayed by pytest for ever.
"""
