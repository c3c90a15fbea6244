"""The harness's vocabularies: made whole, or not at all."""

import json
from importlib.machinery import ModuleSpec

import pytest

from parity import vocabulary


def test_small_vocabulary_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = vocabulary.small.__wrapped__
    folder = build(("aaa aaa",))
    assert folder.is_relative_to(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.keys() == {"vocab.json", "merges.txt", "tokenizer.json"}
    assert json.loads(files["vocab.json"])["<|im_start|>"] == 151644
    monkeypatch.setattr(vocabulary, "_learned", None)  # not called again
    assert build(("aaa aaa",)) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_vocabulary_that_fails_to_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vocabulary, "_learned", lambda texts: ({"a": 0}, [("b", "c")]))
    with pytest.raises(Exception, match="out of vocabulary"):
        vocabulary.small.__wrapped__(("a",))
    assert list((tmp_path / "torchtune-qwen25vl").iterdir()) == []


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(vocabulary.NoVocabularyError, match="dashscope, which is not installed"):
        vocabulary.real.__wrapped__()


def test_other_ranks_are_refused(tmp_path, monkeypatch):
    spec = ModuleSpec("dashscope", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(vocabulary.NoVocabularyError, match="another vocabulary or none"):
        vocabulary.real.__wrapped__()


def test_last_merge():
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"abab": 3, b"aba": 4}
    assert vocabulary._last_merge(b"abab", ranks) == (b"ab", b"ab")
    assert vocabulary._last_merge(b"aba", ranks) == (b"ab", b"a")
