"""Compute devices: where a weight's bytes end up, and the memory, files and engine that take them there."""
