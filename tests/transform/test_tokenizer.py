"""Messages to tokens: the chat template, plain text kept plain, and what is trained on."""

import json
import pickle
import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchtune.data import Message
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS, Qwen2_5Tokenizer

from parity import vocabulary
from parity.conversations import CROP, HOSTILE, SAYINGS, WEATHER, corpus, corpus_texts
from parity.faults.tokens import FAULTS
from torchtune_qwen25vl.transform._tokenizer import Qwen25VLTokenizer
from torchtune_qwen25vl.transform._turns import media_parts

NAMED = set(QWEN2_5_SPECIAL_TOKENS.values())
HELLO = [Message("user", "Hello"), Message("assistant", "Hi!")]


@pytest.fixture(scope="module")
def folder():
    return vocabulary.small(corpus_texts())


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Qwen25VLTokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def real():
    try:
        return vocabulary.real()
    except vocabulary.NoVocabularyError as missing:
        pytest.skip(str(missing))


def tokenize(tokenizer, messages, **kwargs):
    return tokenizer.tokenize_messages(
        messages, num_placeholders=[3] * len(media_parts(messages)), **kwargs
    )


def render(tokenizer, messages, **kwargs):
    tokens, _ = tokenize(tokenizer, messages, **kwargs)
    return tokenizer.decode(tokens, skip_special_tokens=False)


def trained(tokenizer, messages, **kwargs):
    """The text of what is trained on."""
    tokens, mask = tokenize(tokenizer, messages, **kwargs)
    kept = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    return tokenizer.decode(kept, skip_special_tokens=False)


def answers(rendered):
    """What a rendered conversation should train on, found in its text."""
    found = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", rendered, re.DOTALL)
    return [re.sub(r"<\|vision_start\|>.*?<\|vision_end\|>", "", answer) for answer in found]


def test_tokens_of_the_published_vocabulary(real):
    tokenizer = Qwen25VLTokenizer(real / "tokenizer.json")
    tokens, mask = tokenizer.tokenize_messages(HELLO)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    user = [151644, 872, 198, 9707, 151645, 198]
    assistant = [151644, 77091, 198, 13048, 0, 151645, 198]
    assert tokens == system + user + assistant
    assert mask == [True] * 17 + [True] * 3 + [False] * 3 + [True]
    assert [tokenizer.pad_id, tokenizer.eos_id] == [151643, 151645]
    assert tokenizer.stop_tokens == [151645, 151643]


def test_real_vocabulary_is_whole(real):
    assert len(json.loads((real / "vocab.json").read_text("utf-8"))) == 151643
    merges = (real / "merges.txt").read_text("utf-8").splitlines()
    assert len(merges) == 1 + 151387
    assert merges[1] == "\u0120 \u0120"


def test_template(tokenizer):
    call = Message("assistant", '{"name": "f"}', ipython=True, eot=False)
    messages = [
        Message("system", "Be brief."),
        Message("user", [{"type": "image", "content": None}, {"type": "text", "content": "And?"}]),
        Message("assistant", "Let me see.", eot=False),
        call,
        Message("assistant", '{"name": "g"}', ipython=True),
        Message("ipython", "1"),
        Message("tool", [{"type": "video", "content": None}]),
    ]
    assert render(tokenizer, messages, tools=[{"name": "f", "ask": "\u00e5"}], inference=True) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist "
        "with the user query.\n\nYou are provided with function signatures within <tools></tools> "
        'XML tags:\n<tools>\n{"name": "f", "ask": "\u00e5"}\n</tools>\n\nFor each function call, '
        "return a json object with function name and arguments within <tool_call></tool_call> XML "
        'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "And?<|im_end|>\n"
        '<|im_start|>assistant\nLet me see.\n<tool_call>\n{"name": "f"}\n</tool_call>\n'
        '<tool_call>\n{"name": "g"}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n<|vision_start|>"
        "<|video_pad|><|video_pad|><|video_pad|><|vision_end|>\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_same_message_twice_in_a_turn(tokenizer):
    call = Message("assistant", "{}", ipython=True, eot=False)
    messages = [Message("user", "?"), call, call]
    assert render(tokenizer, messages).count("</tool_call>\n<tool_call>") == 1


@pytest.mark.parametrize("chat", corpus(), ids=lambda chat: chat.name)
def test_trained_on_are_the_answers_and_their_ends(tokenizer, chat):
    friendly = chat.without_names()
    kwargs = {"tools": friendly.tools, "inference": friendly.inference}
    expected = answers(render(tokenizer, friendly.messages(), **kwargs))
    found = trained(tokenizer, friendly.messages(), **kwargs)
    if any(re.match(r"\s*[\r\n]", answer) for answer in expected):
        # lines at the beginning share a token with the header's, which is not trained on
        expected = [answer.lstrip() for answer in expected]
        found = re.sub(r"(^|(?<=<\|im_end\|>))\s+", "", found)
    assert found == "".join(expected)


def test_the_check_of_what_is_trained_on_sees_a_fault(tokenizer, monkeypatch):
    right = Qwen25VLTokenizer._encode_pieces

    def one_late(self, pieces):
        tokens, mask = right(self, pieces)
        return tokens, [True, *mask[:-1]]

    monkeypatch.setattr(Qwen25VLTokenizer, "_encode_pieces", one_late)
    assert trained(tokenizer, HELLO) != "".join(answers(render(tokenizer, HELLO)))


def test_answers_that_are_masked_are_not_trained_on(tokenizer):
    messages = [
        Message("user", "1", masked=False),
        Message("assistant", "two", masked=True),
        Message("user", "3", masked=False),
        Message("assistant", "four"),
    ]
    assert trained(tokenizer, messages) == "four<|im_end|>"


def test_parts_of_one_turn_are_masked_apart(tokenizer):
    thought = Message("assistant", "So", masked=True, eot=False)
    call = Message("assistant", "{}", ipython=True)
    messages = [Message("user", "?"), thought, call]
    assert trained(tokenizer, messages) == "\n<tool_call>\n{}\n</tool_call><|im_end|>"
    thought.masked, call.masked = False, True
    assert trained(tokenizer, messages) == "So"


def test_nothing_is_trained_on_in_a_prompt(tokenizer):
    assert trained(tokenizer, HELLO[:1], tools=[WEATHER, CROP], inference=True) == ""


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_that_names_tokens_is_text(tokenizer, text):
    assert not NAMED & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [Message(role, text) for role in ("system", "user", "assistant", "tool")]
    ours, _ = tokenize(tokenizer, messages, tools=[{"name": text}])
    harmless = [Message(message.role, "harmless") for message in messages]
    expected, _ = tokenize(tokenizer, harmless, tools=[{"name": "harmless"}])
    assert [t for t in ours if t in NAMED] == [t for t in expected if t in NAMED]
    assert trained(tokenizer, messages) == f"{text}<|im_end|>"


def test_the_check_of_hostile_text_sees_a_fault(tokenizer):
    messages = [Message("user", HOSTILE["a header"])]
    clean, _ = tokenize(tokenizer, messages)
    with FAULTS["names in a user's text become tokens"].seed():
        faulty, _ = tokenize(tokenizer, messages)
    assert sum(token in NAMED for token in faulty) == 1 + sum(token in NAMED for token in clean)


def by_torchtune(folder):
    """An implementation by others: the BPE of torchtune's Qwen2.5 tokenizer, before its names."""
    theirs = Qwen2_5Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))

    def encode(text):
        pieces = theirs._tokenize(unicodedata.normalize("NFC", text))
        return [theirs.encoder[piece] for piece in pieces]

    return encode


@pytest.fixture(scope="module")
def their_encode(folder):
    return by_torchtune(folder)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
@example(HOSTILE["all in a row"])
@example(SAYINGS["emoji joined"])
@example("")
def test_encode_equals_torchtunes(tokenizer, their_encode, text):
    tokens = tokenizer.encode(text)
    assert tokens == their_encode(text)
    assert tokenizer.decode(tokens) == unicodedata.normalize("NFC", text)


def test_real_vocabulary_encodes_as_torchtunes(real):
    ours = Qwen25VLTokenizer(real / "vocab.json", real / "merges.txt")
    their_encode = by_torchtune(real)
    for text in (*SAYINGS.values(), *HOSTILE.values()):
        assert ours.encode(text) == their_encode(text)


def test_encode_adds_an_end_on_request_and_never_a_beginning(tokenizer):
    assert tokenizer.encode("a", add_bos=True, add_eos=True) == [*tokenizer.encode("a"), 151645]


def test_decode_leaves_out_names_and_ids_without_a_token(tokenizer):
    tokens = [
        151644,
        *tokenizer.encode("a"),
        151665,
        151935,
        152063,
        *tokenizer.encode("b"),
        151645,
    ]
    assert tokenizer.decode(tokens) == "ab"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<|im_start|>ab<|im_end|>"
    assert tokenizer.decode([151657, *tokenizer.encode("a"), 151658]) == "<tool_call>a</tool_call>"
    assert tokenizer.decode([]) == ""


def test_both_forms_of_files_are_one_tokenizer(folder, tokenizer):
    pair = Qwen25VLTokenizer(folder / "vocab.json", folder / "merges.txt")
    assert pair.special_tokens == tokenizer.special_tokens
    for chat in corpus():
        assert tokenize(pair, chat.messages()) == tokenize(tokenizer, chat.messages())


def rewritten(folder, tmp_path, edit):
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    edit(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_older_files_write_merges_as_strings(folder, tokenizer, tmp_path):
    def edit(content):
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    older = Qwen25VLTokenizer(rewritten(folder, tmp_path, edit))
    assert tokenize(older, HELLO) == tokenize(tokenizer, HELLO)


def test_truncation_saved_in_the_file_is_not_applied(folder, tokenizer, tmp_path):
    def edit(content):
        content["truncation"] = {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    saved = Qwen25VLTokenizer(rewritten(folder, tmp_path, edit))
    assert tokenize(saved, HELLO) == tokenize(tokenizer, HELLO)


def test_another_models_tokenizer_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"lacks .*<\|box_end\|>.*another model's"):
        Qwen25VLTokenizer(
            rewritten(folder, tmp_path, lambda content: content["added_tokens"].clear())
        )


def test_named_tokens_may_have_other_ids(folder, tokenizer, tmp_path):
    """A small vocabulary of its own has them behind its last merge."""
    first = len(tokenizer.encode("a")) + 20_000

    def edit(content):
        for number, token in enumerate(content["added_tokens"]):
            token["id"] = first + number

    moved = Qwen25VLTokenizer(rewritten(folder, tmp_path, edit))
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    tokens, mask = tokenize(tokenizer, HELLO)
    expected = [moved.special_tokens[names[t]] if t in names else t for t in tokens]
    assert tokenize(moved, HELLO) == (expected, mask)
    assert moved.decode(expected) == tokenizer.decode(tokens)
    assert moved.decode([moved.pad_id, moved.special_tokens["<tool_call>"]]) == "<tool_call>"


def test_vocabulary_without_merges_is_refused(folder):
    with pytest.raises(ValueError, match="add merges_file"):
        Qwen25VLTokenizer(folder / "vocab.json")


def test_length_is_limited_on_request(folder):
    length = len(tokenize(Qwen25VLTokenizer(folder / "tokenizer.json"), HELLO)[0])
    limited = Qwen25VLTokenizer(folder / "tokenizer.json", max_seq_len=length)
    assert len(tokenize(limited, HELLO)[0]) == length
    limited.max_seq_len -= 1
    with pytest.raises(
        ValueError, match=f"max_seq_len = {length - 1} tokens, this one has {length}"
    ):
        tokenize(limited, HELLO)


@pytest.mark.parametrize(
    ("messages", "kwargs", "message"),
    [
        ([Message("narrator", "Once")], {}, "roles .*got 'narrator'"),
        ([Message("user", [{"type": "audio", "content": 0}])], {}, "type .*got 'audio'"),
        ([Message("user", [{"type": "image", "content": 0}])], {}, "0 .* 1;"),
        (HELLO, {"num_placeholders": [4]}, "1 numbers for 0; Qwen25VLTransform"),
    ],
)
def test_what_cannot_be_tokenized(tokenizer, messages, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.tokenize_messages(messages, **kwargs)


def test_it_travels_to_dataloader_workers(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert tokenize(copy, HELLO) == tokenize(tokenizer, HELLO)


def test_markup_of_a_users_part_is_tokens(tokenizer):
    """A template's own text; beside it what a user types stays text."""
    name, number = "<|box_start|>", 151648
    typed, template = ({"type": "text", "content": name, **more} for more in ({}, {"markup": True}))
    counts = {}
    for title, parts in {
        "typed": [typed],
        "template": [template],
        "both": [typed, template],
    }.items():
        tokens, _ = tokenizer.tokenize_messages([Message("user", parts)])
        counts[title] = tokens.count(number)
    assert counts == {"typed": 0, "template": 1, "both": 1}
