"""Errors about folders with models."""

from __future__ import annotations


class FolderError(ValueError):
    """A folder that holds no model, a broken one, or another one than was asked for: one sentence."""
