"""The style of all pictures: fonts, colours for colour-blind readers, labels beside the lines.

matplotlib is imported when something is drawn; nobody needs it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito, https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = '#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#777777'
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY)
DOTS_PER_INCH = 160


def settings() -> Any:
    """What differs from matplotlib's own style."""
    from cycler import cycler

    return {
        'axes.prop_cycle': cycler(color=COLOURS),
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.titlelocation': 'left',
        'axes.titlesize': 10,
        'axes.labelsize': 9,
        'font.family': 'DejaVu Sans',
        'font.size': 9,
        'legend.fontsize': 8,
        'legend.frameon': False,
        'lines.linewidth': 1.6,
        'savefig.bbox': 'tight',
        'savefig.dpi': DOTS_PER_INCH,
        'xtick.labelsize': 8,
        'ytick.labelsize': 8,
    }


@contextmanager
def style() -> Iterator[None]:
    """Inside, pictures have this style; the user's own settings are as before afterwards."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        yield


def panels(rows: int = 1, columns: int = 1, *, width: float, height: float) -> tuple[Any, Any]:
    """(a figure of so many inches, its axes as an array of rows and columns); needs no display. Call it inside ``style``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def name_beside(axis: Any, *names: str) -> None:
    """The legend to the right of the panel, where it hides nothing; ``names`` in the place of the lines' labels."""
    axis.legend(*([names] if names else []), loc='center left', bbox_to_anchor=(1.0, 0.5))


def save_figure(figure: Any, path: Path) -> Path:
    """Write the picture whole or not at all. Its format is that of the path's name."""
    temporary = path.with_name(f'.{path.name}')
    figure.savefig(temporary, format=path.suffix.removeprefix('.'), dpi=DOTS_PER_INCH, bbox_inches='tight')
    temporary.replace(path)
    return path
