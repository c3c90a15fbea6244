"""Figures: written where matplotlib is, and missed aloud where it is not."""

from PIL import Image

from torchtune_qwen25vl import _plots


def test_a_figure_is_a_file_of_its_size(tmp_path):
    seen = []
    _plots.write_figure(tmp_path / "a.png", seen.append, size=(4, 3), dpi=50)
    assert Image.open(tmp_path / "a.png").size == (200, 150)
    assert len(seen) == 1


def test_without_matplotlib_there_is_none_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_plots, "find_spec", lambda name: None)
    _plots.write_figure(tmp_path / "a.png", lambda figure: None, size=(4, 3), dpi=50)
    assert not list(tmp_path.iterdir())
    assert "a.png is not drawn" in (said := capsys.readouterr().err)
    assert "torchtune-qwen25vl[plots]" in said
