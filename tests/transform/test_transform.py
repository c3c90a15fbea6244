"""Conversations to samples: equal to the reference, whole, and never cut where it hurts."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchtune import config
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.data import Message
from torchtune.datasets._sft import SFTTransform

from parity import vocabulary
from parity.conversations import CLIP, SQUARE, WEATHER, WIDE, corpus, corpus_texts
from parity.faults.tokens import FAULTS
from parity.photos import noise
from parity.stages import Setting
from parity.stages.tokens import differing, measure, our_tokens, their_tokens, transforms
from torchtune_qwen25vl import mrope_position_ids, smart_resize
from torchtune_qwen25vl.transform import resized
from torchtune_qwen25vl.transform._transform import Qwen25VLTransform, SkipSample

IMAGE, VIDEO = 151655, 151656
BIG = noise(560, 420)  # 300 placeholders


@pytest.fixture(scope="module")
def path():
    return vocabulary.small(corpus_texts()) / "tokenizer.json"


@pytest.fixture(scope="module")
def transform(path):
    return Qwen25VLTransform(path)


def text(content):
    return {"type": "text", "content": content}


def image(content):
    return {"type": "image", "content": content}


def ask(*parts, answer="A picture."):
    return [Message("user", [*parts, text("What?")]), Message("assistant", answer)]


def test_corpus_equals_the_reference():
    measurements = list(measure(Setting(small=True)))
    assert sum(not chat.hostile for chat in corpus()) >= 60
    assert len(measurements) == len(corpus())
    assert {m.case: m.error for m in measurements if m.error} == {}


def test_corpus_equals_the_reference_in_qwens_vocabulary():
    try:
        vocabulary.real()
    except vocabulary.NoVocabularyError as missing:
        pytest.skip(str(missing))
    measurements = list(measure(Setting()))
    assert len(measurements) == 2 * len(corpus())
    assert {m.case: m.error for m in measurements if m.error} == {}


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decode_equals_the_reference(path, skip_special_tokens):
    ours, theirs = transforms(path.parent, False)
    for chat in corpus():
        tokens = our_tokens(ours, chat).tolist()
        expected = theirs.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        assert ours.decode(tokens, skip_special_tokens) == expected


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_faults(fault):
    with FAULTS[fault].seed():
        assert any(m.error for m in measure(Setting(small=True)))


@pytest.mark.parametrize("chat", [c for c in corpus() if c.hostile], ids=lambda chat: chat.name)
def test_hostile_text_is_where_the_reference_differs(path, chat):
    ours, theirs = transforms(path.parent, False)
    try:
        found = their_tokens(theirs, chat)
    except (ValueError, IndexError):  # it counts placeholders in what a user says
        found = torch.empty(0)
    assert differing(our_tokens(ours, chat), found) > 0


def test_a_sample_with_images_and_a_video(transform):
    messages = [
        Message("user", [image(SQUARE), {"type": "video", "content": CLIP}, text("and")]),
        Message("assistant", "Yes."),
        *ask(image(WIDE)),
    ]
    sample = {"messages": messages, "tools": None, "id": 3}
    made = transform(sample)
    fields = {"tokens", "mask", "placeholders", "labels", "input_pos", "encoder_input", "id"}
    assert made.keys() == fields
    assert sample.keys() == {"messages", "tools", "id"}
    tokens, labels = made["tokens"], made["labels"]
    assert made["input_pos"].shape == (len(tokens), 3)
    assert tokens.dtype == labels.dtype == made["input_pos"].dtype == torch.int64
    assert made["mask"].dtype == torch.bool
    assert torch.equal(labels, tokens.where(~made["mask"], torch.tensor(IGNORE)))
    kept = labels[labels != IGNORE].tolist()
    assert transform.decode(kept, skip_special_tokens=False) == (
        "Yes.<|im_end|>A picture.<|im_end|>"
    )

    first, last = (
        transform.image_transform({"image": SQUARE}),
        transform.image_transform({"image": WIDE}),
    )
    video = transform.video_transform({"video": CLIP})
    vision = made["encoder_input"]["vision"]
    expected = (first["pixel_values"], video["pixel_values_videos"], last["pixel_values"])
    assert torch.equal(vision["pixel_values"], torch.cat(expected))
    grids = (first["image_grid_thw"], video["video_grid_thw"], last["image_grid_thw"])
    assert torch.equal(vision["grid_thw"], torch.cat(grids))
    placeholders = tokens[(tokens == IMAGE) | (tokens == VIDEO)].tolist()
    counts = [int(grid.prod()) // 4 for grid in grids]
    assert placeholders == [IMAGE] * counts[0] + [VIDEO] * counts[1] + [IMAGE] * counts[2]
    positions = mrope_position_ids(
        tokens.unsqueeze(0),
        torch.cat([grids[0], grids[2]]),
        grids[1],
        [video["second_per_grid_ts"]],
    )
    assert torch.equal(made["input_pos"], positions[0])


def test_the_rate_of_a_video_moves_its_positions(transform):
    slow = ask({"type": "video", "content": CLIP, "fps": 0.5})
    made = transform({"messages": slow})
    video = made["input_pos"][made["tokens"] == VIDEO, 0]
    assert (video - video[0]).unique().tolist() == [0, 8]  # 2 frames last 4 s, 2 positions a second


@pytest.mark.parametrize("fps", [3.0, 7.0, 25.0])
def test_times_of_many_frames_are_not_rounded(transform, fps):
    """A group of 2 frames lasts 2 / fps seconds: at 3 fps 0.667, and the 30th begins at 19.3 s."""
    film = [noise(56, 56)] * 60
    made = transform({"messages": ask({"type": "video", "content": film, "fps": fps})})
    video = made["input_pos"][made["tokens"] == VIDEO, 0]
    first_of_each = (video - video[0]).view(30, -1)[:, 0]
    assert first_of_each.tolist() == [int(2 * group * 2 / fps) for group in range(30)]


def test_default_limits_are_the_documented_ones(path):
    """An image over 1280 placeholders is shrunk to them, and a frame over 768 likewise."""
    large = noise(1200, 1200)
    made = Qwen25VLTransform(path)({"messages": ask(image(large))})
    limits = {"min_pixels": 3136, "max_pixels": 1280 * 784}
    height, width = smart_resize(1200, 1200, **limits)
    assert smart_resize(1200, 1200) == (height, width) != (1200, 1200)
    assert made["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, height // 14, width // 14]]
    film = {"type": "video", "content": [large, large], "fps": 2.0}
    made = Qwen25VLTransform(path)({"messages": ask(film)})
    height, width = smart_resize(1200, 1200, min_pixels=128 * 784, max_pixels=768 * 784)
    assert made["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, height // 14, width // 14]]


def test_text_alone(transform):
    made = transform({"messages": ask()})
    assert "encoder_input" not in made
    ramp = torch.arange(len(made["tokens"])).unsqueeze(1).expand(-1, 3)
    assert torch.equal(made["input_pos"], ramp)


def test_inference_asks_for_an_answer(transform):
    prompt = transform({"messages": ask(image(SQUARE))[:1]}, inference=True)
    assert transform.decode(prompt["tokens"].tolist(), False).endswith("<|im_start|>assistant\n")
    assert prompt.keys() == {"tokens", "mask", "placeholders", "input_pos", "encoder_input"}
    assert prompt["mask"].all()


def test_images_as_tensors(transform):
    pixels = torch.from_numpy(np.array(WIDE)).permute(2, 0, 1)
    ours, expected = (transform({"messages": ask(image(x))}) for x in (pixels, WIDE))
    for name in ("pixel_values", "grid_thw"):
        vision = ours["encoder_input"]["vision"], expected["encoder_input"]["vision"]
        assert torch.equal(vision[0][name], vision[1][name])


def test_tools_of_a_sample_are_offered(transform):
    offered = transform({"messages": ask(), "tools": [WEATHER]})
    assert "tools" not in offered
    assert '"name": "get_weather"' in transform.decode(offered["tokens"].tolist())


def test_torchtunes_dataset_makes_the_same_labels(transform):
    made = transform({"messages": ask(image(SQUARE))})
    through = SFTTransform(model_transform=transform)({"messages": ask(image(SQUARE))})
    assert torch.equal(torch.as_tensor(np.array(through["labels"])), made["labels"])


def limited(path, length, over_long="error", **options):
    return Qwen25VLTransform(path, max_seq_len=length, over_long=over_long, **options)


@pytest.mark.parametrize("over_long", ["error", "shrink_images", "truncate", "skip"])
def test_what_fits_is_left_alone(path, transform, over_long):
    expected = transform({"messages": ask(image(BIG))})
    made = limited(path, len(expected["tokens"]), over_long)({"messages": ask(image(BIG))})
    assert torch.equal(made["tokens"], expected["tokens"])


def test_too_long_is_an_error(path, transform):
    length = len(transform({"messages": ask(image(BIG))})["tokens"])
    rule = (
        f"max_seq_len = {length - 1} tokens, this one has {length}, 300 of them.*lower max_pixels"
    )
    with pytest.raises(ValueError, match=rule) as caught:
        limited(path, length - 1)({"messages": ask(image(BIG))})
    assert not isinstance(caught.value, SkipSample)


def test_too_long_is_skipped_by_name(path):
    with pytest.raises(SkipSample, match="left out because over_long is 'skip'"):
        limited(path, 100, "skip")({"messages": ask(image(BIG))})


@pytest.mark.parametrize("length", [60, 100, 333, 611])
def test_images_are_shrunk_no_more_than_needed(path, transform, length):
    pictures = [BIG, SQUARE, noise(420, 560, seed=1)]
    messages = ask(*map(image, pictures))

    def length_at(max_pixels):
        sizes = [smart_resize(p.height, p.width, max_pixels=max_pixels) for p in pictures]
        return without_images + sum(h * w // 784 for h, w in sizes)

    without_images = len(transform({"messages": messages})["tokens"]) - 300 - 4 - 300
    chosen = max(c for c in range(3136, 1003520, 784) if length_at(c) <= length)
    assert length_at(chosen + 784) > length
    made = limited(path, length, "shrink_images")({"messages": messages})
    expected = Qwen25VLTransform(path, max_pixels=chosen)({"messages": messages})
    assert len(made["tokens"]) == length_at(chosen) <= length
    for name in ("tokens", "labels", "input_pos"):
        assert torch.equal(made[name], expected[name])
    for name, values in made["encoder_input"]["vision"].items():
        assert torch.equal(values, expected["encoder_input"]["vision"][name])
    small = made["encoder_input"]["vision"]["grid_thw"][1]
    assert small.tolist() == [1, 4, 4]  # it need not shrink


def test_images_are_not_shrunk_under_min_pixels(path):
    options = {"min_pixels": 100 * 784}
    with pytest.raises(
        ValueError, match=r"with all images at min_pixels = 78400; raise max_seq_len"
    ):
        limited(path, 90, "shrink_images", **options)({"messages": ask(image(BIG))})


def test_videos_are_not_shrunk(path, transform):
    clip = {"type": "video", "content": [noise(280, 280)] * 4}
    alone = len(transform({"messages": ask(clip)})["tokens"])
    made = limited(path, alone + 20, "shrink_images")({"messages": ask(clip, image(BIG))})
    expected = transform.video_transform({"video": clip["content"]})["video_grid_thw"]
    assert torch.equal(made["encoder_input"]["vision"]["grid_thw"][:1], expected)
    with pytest.raises(ValueError, match="with all images at min_pixels"):
        limited(path, alone - 1, "shrink_images")({"messages": ask(clip)})


def resized_image(content):
    return {"type": "image", "content": content, "resized": True}


def read_pixels(picture, **limits):
    """An image as a worker process reads it: uint8 [h, w, 3]."""
    pixels = resized(picture, *smart_resize(picture.height, picture.width, **limits))
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def assert_equal_vision(made, expected):
    for name, values in expected["encoder_input"]["vision"].items():
        assert torch.equal(made["encoder_input"]["vision"][name], values)


@pytest.mark.parametrize("kind", ["array", "tensor", "image"])
def test_an_image_that_is_resized_already_gives_the_same_patches(transform, kind):
    kinds = {"array": np.asarray, "tensor": torch.from_numpy, "image": Image.fromarray}
    for picture in (BIG, WIDE, SQUARE):
        content = kinds[kind](read_pixels(picture))
        made = transform({"messages": ask(resized_image(content))})
        expected = transform({"messages": ask(image(picture))})
        assert torch.equal(made["tokens"], expected["tokens"])
        assert_equal_vision(made, expected)


def test_no_pixel_limit_applies_to_an_image_that_is_resized_already(path):
    pixels = read_pixels(BIG)
    for limits in ({"max_pixels": 3136}, {"min_pixels": 500_000}):
        small = Qwen25VLTransform(path, **limits)
        made = small({"messages": ask(resized_image(pixels))})
        assert made["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 30, 40]]
        again = small({"messages": ask(image(pixels))})
        assert again["encoder_input"]["vision"]["grid_thw"].tolist() != [[1, 30, 40]]


def test_a_long_strip_is_resized_once(path):
    """Sides of 1 to 143 may be resized; those of its resized copy, 1 to 207, may not again."""
    strip, limits = Image.new("RGB", (350, 50_000), "teal"), {"max_pixels": 300 * 784}
    pixels = read_pixels(strip, **limits)
    assert pixels.shape == (207 * 28, 28, 3)
    transform = Qwen25VLTransform(path, **limits)
    made = transform({"messages": ask(resized_image(pixels))})
    assert_equal_vision(made, transform({"messages": ask(image(strip))}))
    with pytest.raises(ValueError, match="at most 200 times the other"):
        transform({"messages": ask(image(pixels))})


@pytest.mark.parametrize("shape", [(30, 56, 3), (56, 30, 3), (0, 56, 3)])
def test_sides_that_are_no_multiples_are_refused(transform, shape):
    rule = f"sides that are multiples of 28, got {shape[0]} x {shape[1]}; resize it"
    with pytest.raises(ValueError, match=rule):
        transform({"messages": ask(resized_image(np.zeros(shape, np.uint8)))})


def test_an_image_that_is_resized_already_is_not_shrunk(path, transform):
    pixels = read_pixels(BIG)  # 300 placeholders
    alone = len(transform({"messages": ask(resized_image(pixels))})["tokens"])
    messages = ask(resized_image(pixels), image(BIG))
    made = limited(path, alone + 50, "shrink_images")({"messages": messages})
    grids = made["encoder_input"]["vision"]["grid_thw"]
    assert grids[0].tolist() == [1, 30, 40]
    assert int(grids[1].prod()) // 4 <= 50
    with pytest.raises(ValueError, match="resized already, 300 tokens, cannot be shrunk"):
        limited(path, alone - 1, "shrink_images")({"messages": ask(resized_image(pixels))})


def test_truncation_keeps_whole_turns_up_to_an_answer(path, transform):
    turns = [*ask(answer="One."), *ask(image(SQUARE), answer="Two."), *ask(answer="Three.")]
    lengths = [len(transform({"messages": turns[:end]})["tokens"]) for end in (2, 4, 6)]
    for length in range(lengths[0], lengths[2] + 3):
        end = 2 * sum(length >= fitting for fitting in lengths)
        made = limited(path, length, "truncate")({"messages": turns})
        expected = transform({"messages": turns[:end]})
        assert torch.equal(made["tokens"], expected["tokens"])
        assert torch.equal(made["labels"], expected["labels"])
        assert ("encoder_input" in made) == (end >= 4)


def test_truncation_does_not_part_an_answer_from_its_call(path, transform):
    call = Message("assistant", "{}", ipython=True)
    turns = [*ask(), Message("user", "?"), Message("assistant", "So", eot=False), call]
    length = len(transform({"messages": turns})["tokens"])
    made = limited(path, length - 1, "truncate")({"messages": turns})
    assert torch.equal(made["tokens"], transform({"messages": turns[:2]})["tokens"])


def test_truncation_that_leaves_nothing_to_train_on_is_an_error(path, transform):
    masked = [Message("user", "?"), Message("assistant", "No.", masked=True)]
    turns = [*masked, *ask(image(BIG))]
    with pytest.raises(ValueError, match="no beginning of it that fits has an answer to train on"):
        limited(path, 100, "truncate")({"messages": turns})
    with pytest.raises(ValueError, match="choose another over_long"):
        limited(path, 100, "truncate")({"messages": [*ask(), turns[2]]}, inference=True)


def test_a_content_part_of_another_kind_is_refused(transform):
    with pytest.raises(ValueError, match="'text', 'image' or 'video', got 'audio'"):
        transform({"messages": ask({"type": "audio", "content": None})})


def test_an_unknown_policy_is_refused(path):
    with pytest.raises(ValueError, match="error, shrink_images, truncate, skip, got 'cut'"):
        limited(path, 100, "cut")


def test_what_a_recipe_reads_of_its_tokenizer(path):
    written = OmegaConf.create(
        {
            "_component_": "torchtune_qwen25vl.transform._transform.Qwen25VLTransform",
            "path": str(path),
            "max_seq_len": 512,
            "max_pixels": 50176,
            "video": {"max_pixels": 100352},
        }
    )
    tokenizer = config.instantiate(written)
    assert tokenizer.max_seq_len == 512
    assert tokenizer.pad_id == 151643
    assert tokenizer.eos_id == tokenizer.tokenizer.eos_id == 151645
    assert tokenizer.stop_tokens == [151645, 151643]
    assert tokenizer.special_tokens["<|image_pad|>"] == IMAGE
    assert tokenizer.decode(tokenizer.encode(text="Hi", add_bos=False, add_eos=True)) == "Hi"
    tokens, mask = tokenizer.tokenize_messages(ask())
    assert tokens == tokenizer({"messages": ask()})["tokens"].tolist()
    assert len(mask) == len(tokens)


def test_from_a_folder(path, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(path.with_name(name), tmp_path)
    limits = {"min_pixels": 6272, "max_pixels": 62720}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    made = Qwen25VLTransform.from_folder(tmp_path, max_seq_len=99)
    assert (made.min_pixels, made.max_pixels, made.max_seq_len) == (6272, 62720, 99)
    shutil.copy(path, tmp_path)
    again = Qwen25VLTransform.from_folder(tmp_path, max_pixels=9408)
    assert again.max_pixels == 9408
    assert torch.equal(made({"messages": ask()})["tokens"], again({"messages": ask()})["tokens"])


def test_it_travels_to_dataloader_workers(transform):
    copy = pickle.loads(pickle.dumps(transform))
    sample = {"messages": ask(image(SQUARE))}
    assert torch.equal(copy(sample)["tokens"], transform(sample)["tokens"])
