"""Pictures have one style, which stays inside of them."""

from __future__ import annotations

import pytest

matplotlib = pytest.importorskip('matplotlib', reason='the extra `examples` is not installed')

from x_transformers.drawing import COLOURS, DOTS_PER_INCH, name_beside, panels, save_figure, style  # noqa: E402


def test_the_style_does_not_reach_the_pictures_of_the_user():
    before = dict(matplotlib.rcParams)
    with style():
        assert matplotlib.rcParams['legend.frameon'] is False
        assert matplotlib.rcParams['axes.prop_cycle'].by_key()['color'] == list(COLOURS)
    assert dict(matplotlib.rcParams) == before


def test_names_stand_beside_the_panel_and_the_picture_is_sharp(tmp_path):
    from matplotlib.image import imread

    with style():
        figure, [[axis]] = panels(width=4, height=2)
        axis.plot([0, 1], label='a line')
        name_beside(axis)
        figure.canvas.draw()
        assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1
        path = save_figure(figure, tmp_path / 'picture.png')
    assert [left.name for left in tmp_path.iterdir()] == ['picture.png']
    assert imread(path).shape[1] > 3 * DOTS_PER_INCH


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / 'picture.svg'
    path.write_text('old')
    with style():
        figure, _ = panels(width=2, height=2)
    monkeypatch.setattr(type(figure), 'savefig', lambda *given, **options: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        save_figure(figure, path)
    assert path.read_text() == 'old'
