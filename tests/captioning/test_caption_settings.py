"""Which keys of the recipe make another run: every key is of one class, and a new one must be."""

import json
from dataclasses import fields
from pathlib import Path

import captions
import pytest
from omegaconf import OmegaConf

from torchtune_qwen25vl.captioning import Settings
from torchtune_qwen25vl.jobs import read_settings

# captions depend on them: another value is another run
DECISIVE = {
    "model": "other",
    "settings_dir": "other",
    "seed": 1,
    "min_pixels": 784,
    "max_pixels": 50176,
    "preset": "detailed",
    "prompt": "What else?",
    "system_prompt": "",
    "language": "French",
    "trigger": "ohwx",
    "prefix": "<",
    "suffix": ">",
    "newlines": "space",
    "separator": "; ",
    "existing": "append",
    "max_new_tokens": 13,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "repetition_penalty": 1.1,
    "columns": {"tags": "words"},
}
# these say which images there are, where results go, and how fast; a caption stays as it was.
# Which of the possible answers is drawn where answers are sampled does depend on the batch.
INDIFFERENT = {
    "inputs": ["other"],
    "output_dir": "other",
    "retry_failed": True,
    "retry": ["looped"],
    "apply": "edits.jsonl",
    "restart": True,
    "dry_run": True,
    "cache_dir": "other",
    "device": "auto",
    "attention": "eager",
    "cpu_kernels": "torch",
    "allow_downgrade": True,
    "batch_size": 2,
    "batch_tokens": 99,
    "workers": 1,
    "seconds_per_image": 7.0,
    "recursive": False,
    "exclude": "*.gif",
    "outputs": ["csv"],
    "mirror_dir": "other",
    "text_naming": "full",
    "text_suffix": ".caption",
    "table_paths": "relative",
    "write_states": ["done"],
    "review": False,
}
FORMAT = {"dtype", "four_bit"}  # the journal holds what they came to, see its tests


def settings(**changes):
    cfg = captions.config(Path("model"), ["photos"])
    return read_settings(OmegaConf.merge(cfg, changes), Settings)


def test_every_key_has_a_class():
    classes = [set(DECISIVE), {"prompt_file"}, set(INDIFFERENT), FORMAT]
    assert sum(map(len, classes)) == len(set().union(*classes))
    assert {field.name for field in fields(Settings)} == set().union(*classes)


@pytest.mark.parametrize("key", DECISIVE)
def test_what_captions_depend_on_makes_another_run(key):
    assert settings(**{key: DECISIVE[key]}).decisive() != settings().decisive()


@pytest.mark.parametrize("key", INDIFFERENT)
def test_what_captions_do_not_depend_on_makes_no_other_run(key):
    changed = settings(**{key: INDIFFERENT[key]})
    assert getattr(changed, key) != getattr(settings(), key)
    assert changed.decisive() == settings().decisive()


def test_the_words_of_a_prompt_file_count(tmp_path):
    file = tmp_path / "prompt.txt"
    seen = []
    for words in ("What is on it?", "Who is on it?"):
        file.write_text(words)
        seen.append(settings(prompt=None, prompt_file=str(file)).decisive())
    assert [one["prompt"] for one in seen] == ["What is on it?", "Who is on it?"]
    assert seen[0] != settings().decisive()  # the file is named


def test_a_journal_holds_the_decisive_settings_as_they_are():
    """Else every start would be another run."""
    decisive = settings().decisive()
    assert json.loads(json.dumps(decisive)) == decisive


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a"]}, r"columns.caption is str . None, got \['a'\]"),
        ({"tags": 5}, "columns.tags is str . None, got 5"),
        ({"image": None}, "columns.image is str, got None"),
        ({"picture": "a"}, "columns has another key than image, caption, tags: picture"),
        ("image", "columns is a mapping of image, caption, tags, got 'image'"),
        (None, "columns is a mapping of image, caption, tags, got None"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns, message):
    keys = {**captions.config(Path("model"), "photos"), "columns": columns}
    with pytest.raises(ValueError, match=message):
        read_settings(OmegaConf.create(keys), Settings)
