"""Runs of the caption recipe on folders where something was before."""

import logging
import os
from pathlib import Path

import captions
import forked
import pytest

from torchtune_qwen25vl import _cli
from torchtune_qwen25vl.captioning import _records
from torchtune_qwen25vl.jobs import _model


def test_what_could_not_be_written_is_on_retry(run, photos, monkeypatch):
    with monkeypatch.context() as patch:

        def refuse(path, caption):
            raise OSError(13, "not allowed")

        patch.setattr(_records, "write_text", refuse)
        assert run() == 1
    assert set(captions.states(photos / "_captions").values()) == {"failed"}
    assert run() == 1  # the control: nothing is tried again by itself
    assert not captions.texts(photos)
    assert run(retry_failed=True) == 0
    assert len(captions.texts(photos)) == 4
    assert run() == 0


def test_a_failed_image_may_be_captioned_by_hand(run, photos):
    (photos / "bad.png").write_bytes(b"no picture")
    assert run() == 1
    (photos / "bad.txt").write_text("Mine.\n")
    assert run() == 1
    assert run(retry_failed=True) == 0
    assert captions.states(photos / "_captions")["bad.png"] == "skipped"
    assert run() == 0


def test_a_deleted_text_file_is_no_caption(run, photos):
    """Where text files are written, the table of an earlier run is not what counts."""
    run()
    first = captions.texts(photos)
    (photos / "picture 001.txt").unlink()
    assert run(seed=1) == 0  # another run
    assert captions.texts(photos) == first
    found = captions.states(photos / "_captions")
    assert found.pop("picture 001.png") in ("done", "cut", "looped")
    assert set(found.values()) == {"skipped"}


def test_other_outputs_and_names_need_no_model(run, photos, no_model, tmp_path):
    run(outputs=["jsonl"])
    assert not captions.texts(photos)
    no_model()
    (photos / "picture 002.txt").write_text("Mine.\n")
    assert run() == 0
    rows = captions.rows(photos / "_captions")
    expected = {Path(row["image"]).stem + ".txt": row["caption"] + "\n" for row in rows}
    assert captions.texts(photos) == expected | {"picture 002.txt": "Mine.\n"}
    assert run(text_naming="full", mirror_dir=str(tmp_path / "mirror")) == 0
    mirrored = {Path(row["image"]).name + ".txt": row["caption"] + "\n" for row in rows}
    assert captions.texts(tmp_path / "mirror") == mirrored
    assert run(existing="overwrite", output_dir=str(tmp_path / "new"), dry_run=True) == 0


def test_two_images_of_one_name_are_told_apart_on_retry(run, photos):
    (photos / "picture 001.jpg").write_bytes((photos / "picture 001.png").read_bytes())
    assert run() == 1
    assert "text_naming=full" in str(captions.rows(photos / "_captions"))
    assert run(text_naming="full", retry_failed=True) == 0
    assert {"picture 001.jpg.txt", "picture 001.png.txt"} <= set(captions.texts(photos))


def test_done_images_of_one_name_are_not_written_over_each_other(run, photos, caplog):
    (photos / "picture 001.jpg").write_bytes((photos / "picture 002.png").read_bytes())
    assert run(outputs=["jsonl"]) == 0
    assert run() == 2
    assert "picture 001.png has a caption, but its text file" in caplog.text
    assert not captions.texts(photos)
    assert run(text_naming="full") == 0
    captions_of = {Path(r["image"]).name: r["caption"] for r in captions.rows(photos / "_captions")}
    assert captions.texts(photos) == {
        f"{name}.txt": f"{text}\n" for name, text in captions_of.items()
    }


def test_a_new_image_does_not_take_the_text_file_of_another(run, photos):
    run()
    before = captions.texts(photos)
    (photos / "picture 001.jpg").write_bytes((photos / "picture 002.png").read_bytes())
    assert run() == 1
    assert captions.states(photos / "_captions")["picture 001.jpg"] == "failed"
    assert captions.texts(photos) == before


def test_an_image_that_is_gone_keeps_no_text_file(run, photos):
    """Saved anew as another kind of file, an image has the caption that it had."""
    run()
    before = captions.texts(photos)
    (photos / "picture 001.png").rename(photos / "picture 001.jpg")
    assert run() == 0
    assert captions.states(photos / "_captions")["picture 001.jpg"] == "skipped"
    assert captions.texts(photos) == before


def test_what_is_done_survives_a_place_that_cannot_be(run, photos, tmp_path, caplog):
    run(outputs=["jsonl"])
    rows = captions.rows(photos / "_captions")
    (tmp_path / "mirror").write_text("a file")
    assert run(mirror_dir=str(tmp_path / "mirror" / "in it")) in (1, 2)
    assert run(outputs=["jsonl"]) == 0
    assert captions.rows(photos / "_captions") == rows


def test_a_row_that_is_damaged_later_keeps_its_caption(run, photos, tmp_path):
    table = tmp_path / "table.jsonl"
    rows = [f'{{"image": "{path}"}}' for path in sorted(photos.glob("*.png"))]
    table.write_text("\n".join(rows) + "\n")
    changes = {"output_dir": str(tmp_path / "out"), "outputs": ["txt", "jsonl"]}
    assert run(table, **changes) == 0
    table.write_text("\n".join([*rows[:3], '{"image": 3}']) + "\n")
    assert run(table, **changes) == 1
    assert sorted(captions.states(tmp_path / "out").values()).count("failed") == 1


def test_a_text_file_that_is_there_stays_and_is_counted(run, photos, caplog, capsys):
    run(outputs=["jsonl"], existing="append")
    (photos / "picture 001.txt").write_text("Mine.\n")
    assert run(existing="append", dry_run=True) == 0
    assert capsys.readouterr().out.count("has a caption, to be written to") == 3
    assert run(existing="append") == 0
    assert captions.texts(photos)["picture 001.txt"] == "Mine.\n"
    assert "1 text files that are there stay as they are" in caplog.text


def test_a_crash_is_no_failed_image(run, photos, monkeypatch, caplog):
    def crash(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("torchtune_qwen25vl.device._loading.load", crash)
    assert run() == 2
    assert "the device is gone" in caplog.text


def test_a_place_that_cannot_be_is_a_failure(run, photos, tmp_path):
    (tmp_path / "mirror").write_text("a file")
    assert run(mirror_dir=str(tmp_path / "mirror")) == 1
    assert set(captions.states(photos / "_captions").values()) == {"failed"}


def test_line_breaks_that_json_does_not_know(run, photos):
    (photos / "picture 001.txt").write_text("one\u2028two\u0085three", "utf-8")
    assert run() == 0
    assert run(seed=1) == 0


def test_a_table_of_somebody_else_is_named(run, photos, caplog):
    (photos / "_captions").mkdir()
    (photos / "_captions" / "captions.jsonl").write_text('{"file": "a.png"}\n')
    assert run() == 2
    assert "captions.jsonl is no table of captions (KeyError('state'))" in caplog.text


def test_a_damaged_journal_is_left_behind(run, photos, caplog):
    run()
    journal = photos / "_captions" / "journal-0.jsonl"
    journal.write_bytes(b"{\n" + journal.read_bytes())
    assert run() == 2
    assert "restart=True" in caplog.text
    assert run(restart=True, existing="overwrite") == 0
    assert (photos / "_captions" / "earlier-1-journal-0.jsonl").exists()


def test_the_output_folder_may_be_the_input(run, photos):
    assert run(output_dir=str(photos)) == 0
    assert len(captions.texts(photos)) == 4
    assert run(output_dir=str(photos)) == 0


def test_tables_of_files_lie_beside_them_under_their_names(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = sorted(photos.glob("*.png"))[:2]
    run(first, outputs=["jsonl"])
    run(second, outputs=["jsonl"])
    run("photos/*3.png", outputs=["jsonl"])
    for folder in ("picture 000_captions", "picture 001_captions", "_captions"):
        assert len(captions.rows(photos / folder)) == 1


def test_text_files_among_the_inputs_are_no_lists(run, photos):
    run()
    everything = sorted(path for path in photos.iterdir() if path.is_file())
    assert run(*everything, output_dir=str(photos / "_captions")) == 0
    assert len(captions.rows(photos / "_captions")) == 4


@pytest.mark.parametrize(("away", "said"), [(16 * 10**9, "16.00 GB of"), (None, "an unknown part")])
def test_a_dry_run_fetches_nothing(run, photos, monkeypatch, capsys, caplog, away, said):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(_model, "bytes_to_fetch", lambda *_: away)
    monkeypatch.setattr(_model, "fetch", lambda *_, **__: pytest.fail("fetched"))
    os.rename(photos / "picture 000.png", os.fsencode(photos) + b"/caf\xe9.png")
    assert run(dry_run=True) == 0
    assert said in caplog.text
    out = capsys.readouterr().out
    assert "4 to be captioned in" in out
    out.encode("utf-8")
    assert not (photos / "_captions").exists()


def test_the_short_command_says_what_it_does(model, photos, tmp_path):
    words = [str(photos), "--dry-run", f"model={model}", "device=cpu"]
    code, said = forked.run_command(_cli.caption, words, tmp_path / "said")
    assert code == 0, said
    assert "memory of CPU" in said
    assert "sdpa attention" in said
