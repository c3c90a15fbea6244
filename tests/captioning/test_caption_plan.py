"""Items to a plan: what is to be captioned, from what is on disk already."""

import datasets
import pytest
from PIL import Image

from torchtune_qwen25vl.captioning import Record
from torchtune_qwen25vl.captioning._plan import Policy, make_plan
from torchtune_qwen25vl.captioning._texts import TextFiles
from torchtune_qwen25vl.device import _preflight
from torchtune_qwen25vl.generation import RunningBatch
from torchtune_qwen25vl.jobs import Past, find_items


def find(*inputs, **options):
    return find_items(list(map(str, inputs)), **options)


@pytest.fixture
def tree(tmp_path):
    """A folder of files that look like images; the text file of one is empty."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("b.JPG", "a.png", "a.txt", "notes.md"):
        (folder / name).write_bytes(b"")
    return folder


def policy(**changes):
    values = {
        "formats": ["txt"],
        "text_files": TextFiles(),
        "existing": "skip",
        "uses_existing": False,
    }
    return Policy(**{**values, "write_states": ["done"], **changes})


def plan(items, past=None, table=None, *, retry=(), **changes):
    past = past or Past()
    return make_plan(items, policy(**changes), past, table or {}, retry=retry)


def test_two_images_with_one_text_file(tree):
    (tree / "a.jpg").write_bytes(b"")
    found = plan(find(tree, recursive=False)).settled
    failed = [r for r in found.values() if r.state == "failed"]
    (reason,) = [r.reason for r in failed]
    assert reason.startswith("its text file a.txt is that of a.jpg too: set text_naming=full")
    assert not plan(find(tree, recursive=False), text_files=TextFiles(naming="full")).settled


def test_images_in_tables_need_a_mirror(tmp_path):
    held = datasets.Dataset.from_dict({"image": [Image.new("RGB", (30, 30))]})
    held.save_to_disk(str(tmp_path / "saved"))
    items = find(tmp_path / "saved")
    with pytest.raises(ValueError, match="set mirror_dir"):
        plan(items)
    mirrored = plan(items, text_files=TextFiles(tmp_path / "mirror"))
    assert list(mirrored.texts.values()) == [tmp_path / "mirror" / "saved" / "0.txt"]
    assert plan(items, formats=["jsonl"]).pending == items


def test_captions_that_cannot_be_read(tree):
    (tree / "a.txt").write_bytes(b"quote \x92")
    items = find(tree / "a.png")
    (skipped,) = plan(items).settled.values()
    assert (skipped.state, "cannot be read" in skipped.reason) == ("skipped", True)
    (failed,) = plan(items, existing="append").settled.values()
    assert failed.state == "failed"
    assert not plan(items, existing="overwrite").settled
    assert plan(items, existing="overwrite", uses_existing=True).settled


def test_tables_of_an_earlier_run_count_as_captions(tree):
    items = find(tree / "a.png", tree / "b.JPG")
    found = plan(items, table={items[0].name: "Old."}, formats=["jsonl"])
    assert [r.caption for r in found.settled.values()] == ["Old."]


def test_what_was_done_stays_done(tree):
    items = find(tree, recursive=False)
    records = {
        items[0].name: Record(items[0].name, "failed", reason="x"),
        items[1].name: Record(items[1].name, "done", "Text."),
    }
    past = Past({}, records)
    assert plan(items, past, existing="overwrite").settled == records
    again = plan(items, past, existing="overwrite", retry=["failed"])
    assert again.pending == items[:1]


@pytest.mark.parametrize(("given", "allowed", "most"), [(None, 700, 700), (400, 700, 400)])
def test_memory_says_how_many_tokens_a_batch_holds(run, monkeypatch, given, allowed, most):
    """Unless the settings say fewer; never more."""
    entered = []
    made = RunningBatch.enter

    def counted(self, prompts):
        made(self, prompts)
        lengths = [len(question.sample["tokens"]) + 150 for question in self.questions]
        entered.append((len(lengths), len(lengths) * max(lengths)))

    monkeypatch.setattr(RunningBatch, "enter", counted)
    monkeypatch.setattr(_preflight, "token_budget", lambda *args, **options: allowed)
    run(prompt="?", max_pixels=6272, batch_size=9, max_new_tokens=150, batch_tokens=given)
    rows, tokens = max(entered)
    assert tokens <= most < tokens / rows * (rows + 1)


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "batch_tokens"), [("0123456789" * 30, 3, 700), ("?", 150, 400)]
)
def test_a_batch_holds_no_more_tokens_than_it_may(
    run, monkeypatch, prompt, max_new_tokens, batch_tokens
):
    """Its prompts and answers count beside its images, which alone would all fit."""
    sizes = []

    def counted(self, prompts):
        enter(self, prompts)
        lengths = [len(question.sample["tokens"]) + max_new_tokens for question in self.questions]
        sizes.append((len(lengths), len(lengths) * max(lengths)))

    enter = RunningBatch.enter
    monkeypatch.setattr(RunningBatch, "enter", counted)
    limits = {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    run(prompt=prompt, max_pixels=6272, batch_size=9, **limits)
    assert {rows for rows, _ in sizes} == {2}
    assert max(tokens for _, tokens in sizes) <= batch_tokens
