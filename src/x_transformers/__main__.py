"""``python -m x_transformers``: the command line."""

from __future__ import annotations

from x_transformers.cli.main import run

if __name__ == '__main__':
    run()
