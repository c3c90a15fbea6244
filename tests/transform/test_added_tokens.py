"""Tokens that somebody added to Qwen's are tokens here where they are in transformers."""

import json
import pickle
import shutil

import pytest
from tokenizers import AddedToken
from torchtune.data import Message

from parity import reference, vocabulary
from tests.data_samples import SAYINGS
from torchtune_qwen25vl import Qwen25VLTokenizer

FIRST = 151665  # the id after Qwen's last named token
TOKENS = [
    AddedToken("<action_7>", normalized=False),
    AddedToken("<|medicine|>", normalized=False, special=True),
    AddedToken("<left>", normalized=False, lstrip=True),
    AddedToken("<right>", normalized=False, rstrip=True),
    AddedToken("word", normalized=False, single_word=True),
    AddedToken("\u00c5ngstr\u00f6m", normalized=True),
    AddedToken("assistant", normalized=False),
]
TEXTS = [
    "press <action_7> <action_7>now<|medicine|>",
    "  <left>  x <left><left> ",
    "a<right>  b <right>\n\n<right>",
    "word words sword word. word",
    "A\u030angstro\u0308m and \u00c5ngstr\u00f6m",
    "an assistant\nis an assistant",
    "<action_7",
    "word",
]
FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def fields(token):
    return {name: getattr(token, name) for name in FIELDS}


@pytest.fixture
def folder(tmp_path):
    """A small vocabulary with tokens added.

    They stand among its ordinary tokens too: else the library, which numbers added tokens from the
    end of these, would give them other ids than the file does. Qwen's vocabulary has no such gap.
    """
    shutil.copytree(vocabulary.small(SAYINGS), tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] += [
        {"id": FIRST + k, **fields(token)} for k, token in enumerate(TOKENS)
    ]
    content["model"]["vocab"] |= {token.content: FIRST + k for k, token in enumerate(TOKENS)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return tmp_path


def as_pair(folder, **settings):
    """The same folder without its tokenizer.json, with these settings beside its vocab.json."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Qwen25VLTokenizer(folder / "vocab.json", folder / "merges.txt")


def decoder_of(tokens, first=FIRST):
    return {str(first + k): fields(token) for k, token in enumerate(tokens)}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_the_tokens_of_transformers(folder, text):
    ours = Qwen25VLTokenizer(folder / "tokenizer.json")
    theirs = reference.processor(folder).tokenizer
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert pickle.loads(pickle.dumps(ours)).encode(text) == ours.encode(text)


def test_conversations_have_the_tokens_of_transformers(folder):
    ours, theirs = Qwen25VLTokenizer(folder / "tokenizer.json"), reference.processor(folder)
    said = [("user", TEXTS[0]), ("assistant", TEXTS[1]), ("user", TEXTS[4])]
    text = theirs.apply_chat_template([{"role": r, "content": t} for r, t in said])
    tokens, mask = ours.tokenize_messages([Message(role, text) for role, text in said])
    assert tokens == theirs.tokenizer(text)["input_ids"]
    trained = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    assert trained.count(FIRST + 2) == 3  # an answer's tokens have labels


@pytest.mark.parametrize("skip", [True, False])
def test_special_ones_are_left_out_of_texts(folder, skip):
    ours = Qwen25VLTokenizer(folder / "tokenizer.json")
    theirs = reference.processor(folder).tokenizer
    tokens = ours.encode("a<|medicine|> b<action_7>")
    assert FIRST + 1 in tokens
    said = ours.decode(tokens, skip_special_tokens=skip)
    assert said == theirs.decode(tokens, skip_special_tokens=skip)
    assert said == ("a b<action_7>" if skip else "a<|medicine|> b<action_7>")


def test_qwens_own_names_stay_text(folder):
    ours = Qwen25VLTokenizer(folder / "tokenizer.json")
    tokens = ours.encode("<|im_start|><action_7><tool_call>")
    assert [token for token in tokens if token >= 151643] == [FIRST]


def test_files_beside_a_vocabulary_add_tokens(folder):
    whole = Qwen25VLTokenizer(folder / "tokenizer.json")
    pair = as_pair(folder, added_tokens_decoder=decoder_of(TOKENS))
    for text in TEXTS:
        assert pair.encode(text) == whole.encode(text)
    assert pair.special_tokens == whole.special_tokens


def test_a_file_beside_tokenizer_json_adds_tokens(folder):
    config = {"added_tokens_decoder": decoder_of([AddedToken("<new>")], FIRST + 7)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Qwen25VLTokenizer(folder / "tokenizer.json")
    assert tokenizer.encode("<new><action_7>") == [FIRST + 7, FIRST]


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_the_older_list_of_added_tokens(folder, key):
    names = {"<action_7>": FIRST, "<|medicine|>": FIRST + 1}
    (folder / "added_tokens.json").write_text(json.dumps(names))
    tokenizer = as_pair(folder, **{key: ["<|im_start|>", "<|medicine|>"]})
    tokens = tokenizer.encode("<action_7><|medicine|>")
    assert tokens == [FIRST, FIRST + 1]
    assert tokenizer.decode(tokens) == "<action_7>"


def test_what_files_say_of_tokens_and_cannot_be(folder):
    (folder / "config.json").write_text('{"text_config": {"vocab_size": 151670}}')
    with pytest.raises(ValueError, match=r"vocab_size = 151670 of .*'assistant' the id 151671"):
        Qwen25VLTokenizer(folder / "tokenizer.json")
    (folder / "config.json").write_text('{"vocab_size": 151672}')
    assert Qwen25VLTokenizer(folder / "tokenizer.json").encode("assistant") == [151671]
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lists <lost> and no file beside it says"):
        as_pair(folder, extra_special_tokens={"lost_token": "<lost>"})
    twice = {"300000": {"content": "a"}}
    (folder / "tokenizer.json").touch()
    with pytest.raises(ValueError, match=r"has one id, but .*'a' as .* and 300000"):
        as_pair(folder, added_tokens_decoder=twice)
