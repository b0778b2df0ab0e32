"""Sequence mixers in place of attention, in layers 'm'."""
