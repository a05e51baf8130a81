"""Checkpoints of any Hugging Face architecture with seeded random weights, written at the drive's speed."""

from zinfer.synth.build import synthesise
from zinfer.synth.shapes import SHAPES

__all__ = ["SHAPES", "synthesise"]
