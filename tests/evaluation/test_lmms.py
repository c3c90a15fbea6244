"""Our model in lmms-eval: on a stand-in of its base class, and in its own registry where it is."""

import importlib
from importlib.metadata import entry_points
from types import SimpleNamespace

import captions
import pytest
import tables

from torchtune_qwen25vl.evaluation import _lmms, lmms_manifest
from torchtune_qwen25vl.media import load_image

OPTIONS = {"max_new_tokens": 6, "until": ["\n\n"], "temperature": 0, "top_p": None, "num_beams": 1}


class Base:
    """What `lmms` of lmms-eval 0.7.3 gives a model."""

    def __init__(self):
        self.task_dict = {}


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    folder = captions.write_pictures(tmp_path_factory.mktemp("docs") / "images", 3)
    return [{"image": str(path)} for path in sorted(folder.iterdir())]


def messages(doc):
    image = {"type": "image", "url": load_image(doc["image"])}
    return [{"role": "user", "content": [image, {"type": "text", "text": tables.ASKED[0]}]}]


@pytest.fixture
def ask(model, docs):
    """The answers to all documents, by options of the model and of the task."""

    def ask(task=OPTIONS, doc_to_messages=messages, **options):
        limits = {"min_pixels": 3136, "max_pixels": 25088, "device": "cpu", "batch_size": 2}
        made = _lmms.model_class(Base)(model=str(model), **limits | options)
        made.task_dict = {"mine": {"test": docs}}
        args = (("", doc_to_messages, dict(task), k, "mine", "test") for k in range(len(docs)))
        return made.generate_until([SimpleNamespace(args=one) for one in args])

    return ask


def test_answers_are_those_of_the_recipe_evaluate(ask, model, docs, tmp_path):
    rows = [{**doc, "question": tables.ASKED[0], "answer": "x"} for doc in docs]
    table = tables.write_rows(tmp_path / "t.jsonl", rows)
    assert tables.run(model, table, metrics="anls") == 0
    expected = [row["answer"] for row in tables.predictions(tmp_path / "t_evaluation")]
    assert ask() == expected
    assert all(expected)
    first = expected[0][1]
    assert ask(OPTIONS | {"until": first})[0] == expected[0].partition(first)[0]


def test_drawn_answers_are_drawn(ask):
    drawn = ask(OPTIONS | {"temperature": 0.1}), ask(OPTIONS | {"temperature": 0.1}, seed=1)
    assert len({tuple(ask()), *map(tuple, drawn)}) == 3
    assert ask(OPTIONS | {"temperature": 0.1}) == drawn[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 4}, "mine test 0: num_beams = 4 is not computed"),
        ({"length_penalty": 2.0}, "length_penalty = 2.0 is not computed"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_options_that_are_not_computed_are_refused(ask, options, said):
    with pytest.raises(ValueError, match=said):
        ask(OPTIONS | options)


def test_media_that_are_not_read_are_refused(ask):
    def video(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(ValueError, match=r"mine test 0: .*text and images in lmms-eval, got video"):
        ask(doc_to_messages=video)


def test_the_registry_is_told_by_an_entry_point():
    (found,) = entry_points(group="lmms_eval.models", name=_lmms.NAME)
    assert found.load() is lmms_manifest


def test_lmms_eval_takes_the_class():
    pytest.importorskip("lmms_eval", reason="lmms-eval needs an environment of its own")
    manifest = lmms_manifest()
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert issubclass(
        getattr(importlib.import_module(module), name),
        importlib.import_module("lmms_eval.api.model").lmms,
    )
