"""Decides what is read when: the trace, the look-ahead window, residency."""
