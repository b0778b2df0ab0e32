"""Sequence mixers in the place of attention, in layers 'm'."""
