"""Captions that are changed by hand are the captions from then on."""

import json

import captions
import pytest

from torchtune_qwen25vl import _cli


@pytest.fixture
def edited(run, photos, no_model):
    """Photos with captions, of which the second is changed; no other is to be made."""
    run(existing="append")
    no_model()
    (photos / "picture 001.txt").write_text("Mine.\nAll mine.\n", "utf-8")
    return photos


def row(folder, name):
    return next(row for row in captions.rows(folder) if row["image"].endswith(name))


def check(folder, caption="Mine.\nAll mine."):
    assert row(folder, "picture 001.png")["caption"] == caption
    assert json.dumps(caption, ensure_ascii=False)[1:-1] in (folder / "review.html").read_text(
        "utf-8"
    )


def saved(path, folder, **changes):
    """What the review page saves when captions are changed in it, by file name."""
    rows = []
    for one in captions.rows(folder):
        new = changes.get(one["image"].rpartition("/")[2])
        edit = {"edited": new is not None, "caption": one["caption"] if new is None else new}
        rows.append(json.dumps({**one, **edit}, ensure_ascii=False))
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


def test_an_edited_text_file_is_what_tables_and_page_show(run, edited):
    before = captions.texts(edited)
    assert run(existing="append") == 0
    check(edited / "_captions")
    assert captions.texts(edited) == before
    (edited / "picture 001.txt").unlink()  # the control: what is gone comes back as it was edited
    assert run(existing="append") == 0
    assert captions.texts(edited) == before


def test_an_edited_text_goes_where_texts_go_now(run, edited, tmp_path):
    mirror = tmp_path / "mirror"
    assert run(existing="append", text_naming="full", mirror_dir=str(mirror)) == 0
    assert (mirror / "picture 001.png.txt").read_text("utf-8") == "Mine.\nAll mine.\n"
    (mirror / "picture 001.png.txt").write_text("Again.\n")
    assert run(existing="append", outputs=["jsonl"]) == 0
    check(edited / "_captions", "Again.")


def test_an_edited_text_that_cannot_be_read_is_a_failure(run, edited):
    (edited / "picture 001.txt").write_bytes(b"caf\xe9")
    assert run(existing="append") == 1
    assert "cannot be read" in row(edited / "_captions", "picture 001.png")["reason"]
    assert (edited / "picture 001.txt").read_bytes() == b"caf\xe9"
    (edited / "picture 001.txt").write_text("Mended.\n")
    assert run(existing="append") == 0
    check(edited / "_captions", "Mended.")


def test_a_caption_by_hand_is_read_anew_each_time(run, photos):
    """Where the image had failed, too: the journal does not know better."""
    (photos / "bad.png").write_bytes(b"no image")
    run()
    for text in ("Mine.", "Mine again."):
        (photos / "bad.txt").write_text(f"{text}\n")
        assert run(retry_failed=True) == 0
        assert row(photos / "_captions", "bad.png")["caption"] == text
    assert run() == 0
    (photos / "bad.txt").unlink()
    assert run() == 1


def test_edits_of_the_page_are_applied(run, photos, no_model, tmp_path):
    (photos / "picture 003.txt").write_text("There before.\n")
    run(outputs=["txt", "jsonl", "csv"])
    before = captions.texts(photos)
    changes = {"picture 001.png": "New é.", "picture 003.png": "Also new."}
    edits = saved(tmp_path / "edits.jsonl", photos / "_captions", **changes)
    content = edits.read_bytes()
    no_model()
    assert run(apply=str(edits), dry_run=True) == 0
    assert captions.texts(photos) == before
    for _ in range(2):
        assert run(apply=str(edits), outputs=["txt", "jsonl", "csv"]) == 0
        changed = {"picture 001.txt": "New é.\n", "picture 003.txt": "Also new.\n"}
        assert captions.texts(photos) == before | changed
        check(photos / "_captions", "New é.")
        assert "Also new." in (photos / "_captions" / "captions.csv").read_text("utf-8")
    assert row(photos / "_captions", "picture 001.png")["state"] == "done"
    assert run() == 0
    check(photos / "_captions", "New é.")
    assert edits.read_bytes() == content


def test_the_short_command_applies_edits(run, photos, monkeypatch, tmp_path):
    run(outputs=["jsonl"])
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "edits.jsonl", photos / "_captions", **{"picture 001.png": "New."})
    keys = ["workers=0", "outputs=[jsonl]"]
    assert _cli.caption(["--apply", "edits.jsonl", *keys]) == 0
    check(photos / "_captions", "New.")
    assert _cli.caption(["photos", "--apply"]) == 2
    assert _cli.caption(["photos", "--apply", "nowhere.jsonl", *keys]) == 2


def test_edits_that_cannot_be_applied_are_named(run, photos, tmp_path, caplog):
    edits = tmp_path / "edits.jsonl"
    gone = {"image": "/gone.png", "caption": "New.", "edited": True}
    assert run(apply=str(tmp_path / "no-suffix")) == 2
    assert "no-suffix: there is no such file of edits" in caplog.messages[-1]
    edits.write_text(json.dumps(gone) + "\n")
    assert run(apply=str(edits)) == 2
    assert "there was none in" in caplog.text
    run()
    assert run(apply=str(edits)) == 1
    assert "1 edits are of no image here, such as '/gone.png'" in caplog.text
    edits.write_text('{"image": "a.png"}\n')
    assert run(apply=str(edits)) == 2
    assert "row 1, is no edit (KeyError('edited'))" in caplog.text


def test_saved_edits_are_not_overwritten(run, photos, caplog):
    """Saved under the name of the table, they make room for it and stay."""
    run()
    table = photos / "_captions" / "captions.jsonl"
    content = saved(table, photos / "_captions", **{"picture 001.png": "New."}).read_bytes()
    assert run() == 0
    assert (photos / "_captions" / "edits-1.jsonl").read_bytes() == content
    assert "it is now" in caplog.text
    assert run(apply=str(photos / "_captions" / "edits-1.jsonl")) == 0
    check(photos / "_captions", "New.")


def test_captions_of_a_table_become_text_files(run, photos, tmp_path, no_model, capsys):
    table = photos / "table.jsonl"
    rows = [{"image": f"picture 00{i}.png", "caption": f"Number {i}."} for i in range(4)]
    table.write_text("\n".join(map(json.dumps, rows)))
    (photos / "picture 002.txt").write_text("Mine.\n")
    no_model()
    assert run(table, outputs=["jsonl"]) == 0
    assert list(captions.texts(photos)) == ["picture 002.txt"]
    assert run(table, dry_run=True) == 0
    assert capsys.readouterr().out.count("has a caption, to be written to") == 3
    expected = {f"picture 00{i}.txt": f"Number {i}.\n" for i in range(4)}
    assert run(table) == 0
    assert captions.texts(photos) == expected | {"picture 002.txt": "Mine.\n"}
