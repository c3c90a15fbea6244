"""What is gone from the disk, and what comes back."""

import contextlib
import shutil

import captions
import pytest

from torchtune_qwen25vl import captioning


@pytest.fixture
def listed(photos, tmp_path):
    """A list of the photos, which stays when they go."""
    path = tmp_path / "list.txt"
    path.write_text("\n".join(map(str, sorted(photos.glob("*.png")))))
    return path


@pytest.fixture
def vanishing(monkeypatch, tmp_path):
    """A folder is moved away when a step of the recipe begins, and comes back behind the block."""

    @contextlib.contextmanager
    def vanish(folder, step):
        function = getattr(captioning, step)

        def after_moving(*arguments, **options):
            if folder.exists():
                folder.rename(tmp_path / "away")
            return function(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(captioning, step, after_moving)
            yield
        assert not folder.exists()
        (tmp_path / "away").rename(folder)

    return vanish


def test_a_text_file_that_is_gone_is_written_again(run, photos, no_model, capsys):
    run(existing="append")
    before = captions.texts(photos)
    no_model()
    gone = photos / "picture 001.txt"
    gone.unlink()
    assert run(existing="append", dry_run=True) == 0
    assert f"picture 001.png: has a caption, to be written to {gone}" in capsys.readouterr().out
    assert not gone.exists()
    assert run(existing="append") == 0
    assert captions.texts(photos) == before
    assert run(existing="append") == 0  # the control: nothing is appended a second time
    assert captions.texts(photos) == before


def test_a_drive_that_comes_back_has_lost_nothing(run, photos, listed, no_model, tmp_path):
    output = tmp_path / "out"
    assert run(listed, output_dir=str(output)) == 0
    before, rows = captions.texts(photos), captions.rows(output)
    photos.rename(tmp_path / "away")
    no_model()
    assert run(listed, output_dir=str(output)) == 1
    assert set(captions.states(output).values()) == {"failed"}
    assert "there is no such folder" in captions.rows(output)[0]["reason"]
    assert not photos.exists()
    (tmp_path / "away").rename(photos)
    assert run(listed, output_dir=str(output)) == 0
    assert captions.texts(photos) == before
    assert captions.rows(output) == rows


@pytest.mark.parametrize("step", ["Questioner", "records_of"])
def test_a_drive_that_vanishes_in_the_middle(run, photos, listed, vanishing, tmp_path, step):
    """No image is read, or no caption is written; all is tried again without being asked."""
    output = tmp_path / "out"
    with vanishing(photos, step):
        assert run(listed, output_dir=str(output)) == 1
        assert set(captions.states(output).values()) == {"failed"}
        assert run(listed, output_dir=str(output)) == 1  # the control: it has not come back
    assert run(listed, output_dir=str(output)) == 0
    assert len(captions.texts(photos)) == 4


def test_a_mirror_that_is_gone_is_not_made_anew(run, photos, tmp_path, caplog, no_model):
    mirror = tmp_path / "mirror"
    captions.write_pictures(photos / "inner", 1, seed=1)
    assert run(mirror_dir=str(mirror)) == 0
    before = captions.texts(mirror)
    no_model()
    shutil.rmtree(mirror / "inner")
    assert run(mirror_dir=str(mirror)) == 0
    assert captions.texts(mirror) == before
    shutil.rmtree(mirror)
    assert run(mirror_dir=str(mirror)) == 2
    assert "which is gone: put it back" in caplog.text
    assert not mirror.exists()
    mirror.mkdir()
    assert run(mirror_dir=str(mirror)) == 0
    assert captions.texts(mirror) == before


@pytest.mark.parametrize("step", ["records_of", "write_outputs"])
def test_an_output_folder_that_is_gone_stops_the_run(
    run, photos, vanishing, caplog, tmp_path, step
):
    output = tmp_path / "out"
    with vanishing(output, step):
        assert run(output_dir=str(output)) == 2
        assert "is gone: put" in caplog.text
    assert run(output_dir=str(output)) == 0
    assert len(captions.texts(photos)) == 4
