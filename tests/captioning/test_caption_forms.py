"""The form of captions and the places they go to."""

import os
import stat

import captions
import pytest

from torchtune_qwen25vl.captioning._prompts import Wording


@pytest.mark.parametrize(
    ("existing", "policy", "expected"),
    [
        ("Mine.", "append", "ohwx, Mine.; new"),
        ("ohwx, Mine.", "append", "ohwx, Mine.; new"),
        ("Mine.", "prepend", "ohwx, new; Mine."),
        ("ohwx, Mine.", "prepend", "ohwx, new; Mine."),
        ("", "append", "ohwx, new"),
        ("Mine.", "overwrite", "ohwx, new"),
    ],
)
def test_the_trigger_leads_whatever_is_joined(existing, policy, expected):
    wording = Wording("?", trigger="ohwx", separator="; ")
    assert wording.joined(existing, wording.around("new"), policy) == expected


def test_one_line_or_as_it_is():
    answer = "First.\n\n- second\r\n  third "
    assert Wording("?").around(answer) == answer
    assert Wording("?", newlines="space").around(answer) == "First. - second third"


def test_texts_of_another_suffix(run, photos, no_model):
    assert run() == 0
    before = captions.texts(photos)
    no_model()
    assert run(text_suffix=".caption") == 0
    found = {path.name: path.read_text() for path in photos.glob("*.caption")}
    assert found == {name.replace(".txt", ".caption"): text for name, text in before.items()}
    for wrong in (".png", "caption", "", "/x", ".heic"):
        assert run(text_suffix=wrong) == 2


def test_written_files_are_readable_by_all(run, photos):
    before = os.umask(0o022)
    try:
        run()
    finally:
        os.umask(before)
    written = [*photos.glob("*.txt"), *(photos / "_captions").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.is_file()} == {0o644}


def test_images_that_a_shell_lists_have_one_output_folder(run, photos):
    assert run(*sorted(photos.glob("*.png"))) == 0
    assert len(captions.rows(photos / "_captions")) == 4
