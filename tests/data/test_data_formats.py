"""Rows of the public formats to messages: roles, texts to the letter, pictures in their places."""

import base64
import json

import datasets
import numpy as np
import pytest

from tests.data_samples import (
    messages_of,
    save_pictures,
    save_video,
    seen,
    transform,
    write_json,
    write_jsonl,
)
from torchtune_qwen25vl import smart_resize
from torchtune_qwen25vl.data import hf_dataset, llava_dataset, openai_dataset, swift_dataset
from torchtune_qwen25vl.data import sharegpt_dataset as sharegpt


def said(*pairs, keys=("from", "value")):
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


def spoken(*pairs):
    return said(*pairs, keys=("role", "content"))


A = ("assistant", "A.")


@pytest.fixture
def shown(tmp_path):
    """Two pictures, a.png and b.png, as a reader should see them."""
    return [seen(image) for image in save_pictures(tmp_path, "a.png", "b.png")]


def refused(dataset, match, index=0):
    with pytest.raises(ValueError, match=match) as error:
        dataset[index]
    assert f"{dataset.source}, row {index}: " in str(error.value)


# LLaVA, QwenLM ---------------------------------------------------------------------------------


def test_llava(tmp_path, shown):
    rows = [
        {
            "id": "1",
            "image": "a.png",
            "conversations": said(
                ("human", "<image>\nWhat's the main object?"), ("gpt", "A red apple")
            ),
        },
        {
            "image": ["a.png", "b.png"],
            "conversations": said(
                ("system", "Be <image> brief."),
                ("human", "<image>\n<image>\n Differences? \n"),
                ("gpt", "An <image> tag.\n"),
                ("human", "And \n<image>"),
                ("gpt", "None"),
            ),
        },
    ]
    rows[1]["image"].append("a.png")
    for source in (
        write_json(tmp_path / "l.json", *rows),
        write_jsonl(tmp_path / "l.jsonl", *rows),
    ):
        dataset = llava_dataset(transform(), source=source)
        assert messages_of(dataset) == [
            ("user", [shown[0], "What's the main object?"], False),
            ("assistant", ["A red apple"], True),
        ]
        assert messages_of(dataset, 1) == [
            ("system", ["Be <image> brief."], False),
            ("user", [shown[0], shown[1], " Differences? \n"], False),
            ("assistant", ["An <image> tag.\n"], True),
            ("user", ["And ", shown[0]], False),
            ("assistant", ["None"], True),
        ]


def test_llava_videos_and_text_only(tmp_path):
    save_video(tmp_path / "v.mp4")
    row = {"video": "v.mp4", "conversations": said(("human", "<video>\nWhy?"), ("gpt", "So."))}
    text = {"conversations": said(("human", "Hello"), ("gpt", "Hi"))}
    source = write_jsonl(tmp_path / "l.jsonl", row, text)
    dataset = llava_dataset(transform(), source=source)
    assert messages_of(dataset)[0] == ("user", [[5, *[(64, 48)] * 10], "Why?"], False)
    assert messages_of(dataset, 1)[0] == ("user", ["Hello"], False)
    assert dataset[0]["encoder_input"]["vision"]["grid_thw"][0, 0] == 5
    assert "encoder_input" not in dataset[1]


def test_one_newline_on_each_side_belongs_to_a_place(tmp_path, shown):
    turns = said(("human", "One\n\n<image>\n\nTwo"), ("gpt", "So."))
    source = write_jsonl(tmp_path / "l.jsonl", {"image": "a.png", "conversations": turns})
    dataset = llava_dataset(transform(), source=source)
    assert messages_of(dataset)[0] == ("user", ["One\n", shown[0], "\nTwo"], False)


FRAMES = ["a.png", "b.png"]


def test_images_in_a_list_are_a_video(tmp_path, shown):
    film = {"type": "video", "video": FRAMES}
    rows = {
        llava_dataset: {"video": FRAMES, "conversations": said(("human", "<video>"), ("gpt", "A"))},
        swift_dataset: {"videos": [FRAMES], "messages": spoken(("user", "<video>"), A)},
        openai_dataset: {"messages": spoken(("user", [film]), A)},
        hf_dataset: {"videos": FRAMES, "messages": spoken(("user", [{"type": "video"}]), A)},
    }
    for build, row in rows.items():
        source = write_jsonl(tmp_path / f"{build.__name__}.jsonl", row)
        for fps in (None, 4.0):
            dataset = build(transform(), source=source, fps=fps)
            assert messages_of(dataset)[0][1][0] == [fps, (56, 84), (56, 84)]
            assert dataset[0]["encoder_input"]["vision"]["grid_thw"][0, 0] == 1
    own = write_jsonl(
        tmp_path / "own.jsonl", {"messages": spoken(("user", [{**film, "fps": 2.0}]), A)}
    )
    assert messages_of(openai_dataset(transform(), source=own, fps=4.0))[0][1][0][0] == 2.0


def test_rates_of_frames_reach_positions(tmp_path, shown):
    row = {"videos": [FRAMES * 2], "messages": spoken(("user", "<video>"), A)}
    source = write_jsonl(tmp_path / "s.jsonl", row)
    last = [
        int(swift_dataset(transform(), source=source, fps=fps)[0]["input_pos"][-1].max())
        for fps in (0.1, None)
    ]
    assert last[0] > last[1]


@pytest.mark.parametrize(
    ("film", "match"),
    [
        ({"video": FRAMES, "num_frames": 2}, "fps is heeded, .* but not num_frames"),
        ({"video": ["a.png", "gone.png"]}, "gone.png: no such file"),
        ({"video": ["a.png", "c.png"]}, "all of one height and width"),
        ({"video": []}, "got 0 frames"),
        ({"video": FRAMES, "fps": 0}, "fps is a number above 0, got 0"),
        ({"video": "a.mp4", "sample_fps": 2}, "heeded, got .'sample_fps'"),
    ],
)
def test_lists_of_frames_that_cannot_be(tmp_path, shown, film, match):
    save_pictures(tmp_path, "c.png", width=84)
    row = {"messages": spoken(("user", [{"type": "video", **film}]), A)}
    refused(openai_dataset(transform(), source=write_jsonl(tmp_path / "o.jsonl", row)), match)


@pytest.mark.parametrize("wish", [{}, {"fps": 2.0}, {"num_frames": 1}])
def test_a_film_of_one_frame_is_read_or_refused_by_name(tmp_path, wish):
    save_video(tmp_path / "one.mp4", num_frames=1)
    row = {"messages": spoken(("user", [{"type": "video", "video": "one.mp4", **wish}]), A)}
    dataset = openai_dataset(transform(), source=write_jsonl(tmp_path / "o.jsonl", row))
    if wish:
        refused(dataset, "one.mp4: at least 2 and at most all 1 frames can be kept")
    else:
        assert dataset[0]["encoder_input"]["vision"]["grid_thw"][0, 0] == 1


def test_packed_files_of_qwen_are_read_row_by_row(tmp_path):
    rows = [{"conversations": said(("human", str(k)), ("gpt", "yes"))} for k in range(3)]
    for source in (
        write_json(tmp_path / "p.json", rows[:2], rows[2]),
        write_jsonl(tmp_path / "p.jsonl", rows[:2], rows[2]),
    ):
        dataset = llava_dataset(transform(), source=source)
        assert [messages_of(dataset, k)[0][1] for k in range(3)] == [["0"], ["1"], ["2"]]


def test_boxes_of_a_text_are_left_or_moved(tmp_path):
    save_pictures(tmp_path, "a.png", width=560, height=280)
    limits = {"max_pixels": 28 * 28 * 50}
    answer = '{\n"bbox_2d": [56, 28, 560, 280]\n}'
    row = {"image": "a.png", "conversations": said(("human", "<image>\nWhere?"), ("gpt", answer))}
    source = write_jsonl(tmp_path / "l.jsonl", row)
    left = llava_dataset(transform(**limits), source=source)
    assert messages_of(left)[1][1] == [answer]
    moved = llava_dataset(transform(**limits), source=source, boxes="original")
    assert smart_resize(280, 560, **limits) == (140, 280)
    assert messages_of(moved)[1][1] == ['{\n"bbox_2d": [28, 14, 280, 140]\n}']
    assert moved[0]["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 10, 20]]
    shrinking = transform(**limits, over_long="shrink_images")
    refused(llava_dataset(shrinking, source=source, boxes="original"), "over_long='shrink_images'")
    with pytest.raises(ValueError, match="'resized' or 'original', got 'orginal'"):
        llava_dataset(transform(), source=source, boxes="orginal")


# ShareGPT, LLaMA-Factory, ms-swift ---------------------------------------------------------------


def test_sharegpt(tmp_path, shown):
    row = {
        "conversations": said(("human", "<image>Who\n<image>\n?"), ("gpt", "They.")),
        "images": ["a.png", "b.png"],
        "videos": [],
        "system": "Look.",
    }
    source = write_json(tmp_path / "s.json", row)
    assert messages_of(sharegpt(transform(), source=source)) == [
        ("system", ["Look."], False),
        ("user", [shown[0], "Who\n", shown[1], "\n?"], False),
        ("assistant", ["They."], True),
    ]


def test_llama_factory_columns_and_tags(tmp_path, shown):
    columns = {"messages": "chat", "images": "pictures"}
    tags = {"role_tag": "role", "content_tag": "text", "user_tag": "user", "assistant_tag": "bot"}
    chat = [{"role": "user", "text": "<image>Who?"}, {"role": "bot", "text": "I."}]
    source = write_json(tmp_path / "s.json", {"chat": chat, "pictures": "a.png"})
    dataset = sharegpt(transform(), source=source, columns=columns, tags=tags)
    assert messages_of(dataset) == [
        ("user", [shown[0], "Who?"], False),
        ("assistant", ["I."], True),
    ]
    with pytest.raises(ValueError, match=r"can be mapped are .*, got \['pictures'\]"):
        sharegpt(transform(), source=source, columns={"pictures": "images"})


def test_swift_with_loss_marks_and_objects(tmp_path):
    save_pictures(tmp_path, "a.png", width=560, height=280)
    messages = spoken(("user", "<image>Hello"), ("assistant", "Hi"), ("user", "<ref-object>?"))
    messages[1]["loss"] = False
    messages.append({"role": "assistant", "content": "at <bbox>", "loss": True})
    row = {
        "messages": messages,
        "images": ["a.png"],
        "objects": {"ref": ["dog"], "bbox": [[55.5, 28, 560, 280]], "bbox_type": "real"},
    }
    source = write_jsonl(tmp_path / "s.jsonl", row)
    dataset = swift_dataset(transform(max_pixels=28 * 28 * 50), source=source)
    roles_and_texts = [(role, parts[-1], trained) for role, parts, trained in messages_of(dataset)]
    assert roles_and_texts == [
        ("user", "Hello", False),
        ("assistant", "Hi", False),
        ("user", "dog?", False),
        ("assistant", "at [28, 14, 280, 140]", True),
    ]
    sample = dataset[0]
    trained = [int(t) for t, m in zip(sample["tokens"], sample["mask"], strict=True) if not m]
    decoded = transform().decode(trained, skip_special_tokens=False)
    assert decoded == "at [28, 14, 280, 140]<|im_end|>"


def test_tools_of_sharegpt_swift_and_openai_read_alike(tmp_path):
    function = {"name": "rain", "description": "Will it?", "parameters": {"type": "object"}}
    call = {"name": "rain", "arguments": {"city": "K\u00f6ln"}}
    wrapped = [{"type": "function", "function": function}]
    calls = [{"type": "function", "function": {**call, "arguments": '{"city": "K\u00f6ln"}'}}]
    shares = {
        "conversations": said(
            ("human", "Rain?"),
            ("function_call", json.dumps(call)),
            ("observation", "yes"),
            ("gpt", "Yes."),
        ),
        "tools": json.dumps([function]),
    }
    swift = {
        "messages": spoken(
            ("user", "Rain?"),
            ("tool_call", json.dumps(call)),
            ("tool", "yes"),
            ("assistant", "Yes."),
        ),
        "tools": json.dumps(wrapped),
    }
    openai = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "yes", "tool_call_id": "1"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": wrapped,
    }
    samples = [
        build(transform(), source=write_jsonl(tmp_path / f"{build.__name__}.jsonl", row))[0]
        for build, row in ((sharegpt, shares), (swift_dataset, swift), (openai_dataset, openai))
    ]
    text = transform().decode(samples[0]["tokens"].tolist(), skip_special_tokens=False)
    assert '\n{"type": "function", "function": {"name": "rain", ' in text
    assert '<tool_call>\n{"name": "rain", "arguments": {"city": "K\u00f6ln"}}\n</tool_call>' in text
    for sample in samples[1:]:
        assert sample["tokens"].tolist() == samples[0]["tokens"].tolist()
        assert sample["labels"] == samples[0]["labels"]


def test_a_text_and_its_calls_share_a_turn(tmp_path):
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("one", "two")]
    messages = spoken(("user", "Go"), ("assistant", "Going."))
    messages[1]["tool_calls"] = calls
    source = write_jsonl(tmp_path / "o.jsonl", {"messages": messages})
    dataset = openai_dataset(transform(), source=source)
    text = transform().decode(dataset[0]["tokens"].tolist(), skip_special_tokens=False)
    assert text.count("<|im_start|>assistant") == 1
    assert text.index("Going.") < text.index('"one"') < text.index('"two"')


# OpenAI, Qwen ------------------------------------------------------------------------------------


def test_openai(tmp_path, shown):
    data = base64.b64encode((tmp_path / "b.png").read_bytes()).decode()
    save_video(tmp_path / "v.mp4")
    content = [
        {"type": "image", "image": (tmp_path / "a.png").as_uri()},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "path": "b.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "base64": data},
        {"type": "video", "video": "v.mp4", "fps": 2.0, "max_frames": 128},
        {"type": "text", "text": " <image> Describe. "},
    ]
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": content},
            {"role": "assistant", "content": "A <video>.", "weight": 0},
            {"role": "user", "content": "Again"},
            {"role": "assistant", "content": [{"type": "text", "text": "A."}], "weight": 1},
        ]
    }
    dataset = openai_dataset(transform(), source=write_jsonl(tmp_path / "o.jsonl", row))
    a, b = shown
    assert messages_of(dataset) == [
        ("system", ["Be brief."], False),
        ("user", [a, b, a, b, a, b, [2, *[(64, 48)] * 4], " <image> Describe. "], False),
        ("assistant", ["A <video>."], False),
        ("user", ["Again"], False),
        ("assistant", ["A."], True),
    ]


def test_limits_of_one_image(tmp_path):
    save_pictures(tmp_path, "a.png", width=560, height=280)
    own = {"type": "image", "image": "a.png", "min_pixels": 784, "max_pixels": 28 * 28 * 50}
    text = {"type": "text", "text": '"bbox_2d": [0, 0, 56, 28]'}

    def dataset(*parts, **options):
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]
        source = write_jsonl(tmp_path / "o.jsonl", {"messages": messages})
        return openai_dataset(transform(**options), source=source, boxes="original")

    limited = dataset(own, text)
    assert limited[0]["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 10, 20]]
    assert messages_of(limited)[0][1][1] == '"bbox_2d": [0, 0, 28, 14]'
    by_tokenizer = dataset({"type": "image", "image": "a.png"}, max_pixels=28 * 28 * 50)
    ours, theirs = (
        d[0]["encoder_input"]["vision"]["pixel_values"] for d in (limited, by_tokenizer)
    )
    np.testing.assert_array_equal(ours, theirs)
    outside = dataset(own, text, min_pixels=100_000)  # its own limits go before the tokenizer's
    assert outside[0]["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 10, 20]]
    assert messages_of(outside)[0][1][1] == '"bbox_2d": [0, 0, 28, 14]'
    refused(dataset({**own, "resized_height": 28}), "only .* are heeded, got .'resized_height'")
    refused(dataset({"type": "video", "video": "a.mp4", "min_pixels": 9}), "heeded")


# HF datasets -------------------------------------------------------------------------------------


def image_rows(folder, **columns):
    """A dataset on disk with an image column, its dicts padded with null as Arrow does."""
    parts = [
        {"type": "image", "text": None},
        {"type": "text", "text": "What?"},
    ]
    rows = {
        "images": [[str(folder / "a.png"), str(folder / "b.png")], []],
        "messages": [
            [
                {"role": "user", "content": [parts[0], *parts]},
                {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
            ],
            [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]},
            ],
        ],
    }
    table = datasets.Dataset.from_dict({**rows, **columns})
    return table.cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("storage", ["folder", "splits", "parquet", "builder"])
def test_hf_image_columns(tmp_path, shown, storage, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, source, options = image_rows(tmp_path), str(tmp_path / "rows"), {}
    if storage == "folder":
        rows.save_to_disk(source)
    elif storage == "splits":
        datasets.DatasetDict({"valid": rows}).save_to_disk(source)
        options = {"split": "valid"}
    else:
        source = str(tmp_path / "rows.parquet")
        rows.to_parquet(source)
    if storage == "builder":
        source, options = "parquet", {"data_files": source, "split": "train[:2]"}
    dataset = hf_dataset(transform(), source=source, **options)
    assert len(dataset) == 2
    assert messages_of(dataset) == [
        ("user", [*shown, "What?"], False),
        ("assistant", ["That."], True),
    ]
    assert messages_of(dataset, 1) == [("user", ["Hi"], False), ("assistant", ["Ho"], True)]
    assert isinstance(dataset.rows[0]["images"][0], dict)  # not decoded before it is needed


def test_hf_prompt_and_completion(tmp_path, shown):
    prompt = [
        *spoken(("user", "Hi"), ("assistant", "Ho")),
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    ]
    rows = [
        {"image": "a.png", "prompt": prompt, "completion": spoken(("assistant", "That."))},
        {"prompt": "Hi", "completion": "Ho", "image": None},
    ]
    dataset = hf_dataset(transform(), source=write_jsonl(tmp_path / "h.jsonl", *rows))
    assert messages_of(dataset) == [
        ("user", ["Hi"], False),
        ("assistant", ["Ho"], False),
        ("user", [shown[0], "What?"], False),
        ("assistant", ["That."], True),
    ]
    assert messages_of(dataset, 1) == [("user", ["Hi"], False), ("assistant", ["Ho"], True)]


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ([("humman", "Hi"), ("gpt", "Ho")], "a speaker is one of .*, got 'humman'"),
        ([("human", "Hi"), ("user", "Hi"), ("gpt", "Ho")], "turn 1 is of role 'user', but after u"),
        ([("human", "Hi"), ("gpt", "Ho"), ("gpt", "Ho")], "turn 2 is of role 'assistant'"),
        ([("gpt", "Ho"), ("human", "Hi")], "turn 0 is of role 'assistant', but after the begin"),
        ([("human", "Hi"), ("system", "Be.")], "turn 1 is of role 'system'"),
        ([("human", "Hi")], "teaches nothing"),
        ([("human", "Hi"), ("gpt", " ")], "turn 1 is an empty answer"),
        ([("human", 3), ("gpt", "Ho")], "a text is a string, got int 3"),
        ([], "teaches nothing"),
    ],
)
def test_conversations_that_cannot_be(tmp_path, turns, match):
    source = write_jsonl(tmp_path / "l.jsonl", {"conversations": said(*turns)})
    refused(llava_dataset(transform(), source=source), match)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"image": "a.png"}, "no 'conversations' in the row, which holds .'image'"),
        ({"conversations": ["Hi"]}, "not laid out as its format says"),
        ({"conversations": [{"from": "human"}]}, "no 'value' in the row, which holds .'from'"),
        ({"conversations": None}, "no 'conversations'"),
    ],
)
def test_rows_of_another_layout(tmp_path, row, match):
    refused(llava_dataset(transform(), source=write_jsonl(tmp_path / "l.jsonl", row)), match)


@pytest.mark.parametrize(
    ("text", "images", "match"),
    [
        ("<image>\nWhat?", [], "got 1 places .* for 0 images"),
        ("<image>\n<image>\nWhat?", ["a.png"], "got 2 places .* for 1 images"),
        ("What?", ["a.png", "b.png"], "got 0 places .* for 2 images"),
        ("<video>What?", ["a.png"], "got 0 places .* for 1 images"),
        ("<image>What?", ["c.png"], "c.png: no such file"),
    ],
)
def test_every_medium_needs_its_place(tmp_path, shown, text, images, match):
    row = {"image": images, "conversations": said(("human", text), ("gpt", "That."))}
    source = write_jsonl(tmp_path / "l.jsonl", row)
    refused(llava_dataset(transform(), source=source), match)
    refused(llava_dataset(transform(), source=source, prepend_media=True), match)


def test_one_image_without_a_place_may_be_shown_first(tmp_path, shown):
    turns = said(("system", "Be."), ("human", "What?"), ("gpt", "That."))
    source = write_jsonl(tmp_path / "l.jsonl", {"image": "a.png", "conversations": turns})
    refused(llava_dataset(transform(), source=source), "got 0 places .* for 1 images")
    dataset = llava_dataset(transform(), source=source, prepend_media=True)
    assert messages_of(dataset)[1] == ("user", [shown[0], "What?"], False)


@pytest.mark.parametrize(
    ("mark", "match"),
    [
        ({"loss": 0.5}, "'loss' is true, false, 0 or 1, got 0.5"),
        ({"weight": "no"}, "'weight' is a number from 0, got 'no'"),
        ({"role": "user", "loss": True}, "only an assistant's turns"),
        ({"loss": False}, "teaches nothing"),
    ],
)
def test_marks_of_loss_that_cannot_be(tmp_path, mark, match):
    messages = spoken(("user", "Hi"), ("assistant", "Ho"))
    messages[0 if "role" in mark else 1] |= mark
    source = write_jsonl(tmp_path / "s.jsonl", {"messages": messages})
    refused(swift_dataset(transform(), source=source), match)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"type": "audio", "audio": "a.wav"}, "got 'audio'"),
        ({"text": "no type"}, "no 'type'"),
        ({"type": "text"}, "no 'text'"),
        ({"type": "image", "base64": "@"}, "base64 text of a part is damaged"),
        ({"type": "image"}, "got 1 places .* for 0 images"),
    ],
)
def test_parts_that_cannot_be(tmp_path, part, match):
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]
    source = write_jsonl(tmp_path / "o.jsonl", {"messages": messages})
    refused(openai_dataset(transform(), source=source), match)


@pytest.mark.parametrize("call", ['{"arguments": {}}', '{"name": "x", "arguments": []}', "no json"])
def test_calls_that_cannot_be(tmp_path, call):
    turns = said(("human", "Hi"), ("function_call", call))
    source = write_jsonl(tmp_path / "s.jsonl", {"conversations": turns})
    refused(sharegpt(transform(), source=source), "a tool call has a name|Expecting value")
