"""Conversations to the batch that is continued."""

import torch
from PIL import Image
from torchtune.data import Message

from torchtune_qwen25vl import padded_collate, shapes
from torchtune_qwen25vl.generation import inference_batch


def question(text, *sizes):
    images = [{"type": "image", "content": Image.new("RGB", size, "red")} for size in sizes]
    return [Message("user", [*images, {"type": "text", "content": text}])]


def test_a_batch_is_left_padded_and_waits_for_answers():
    transform = shapes.tiny_transform()
    conversations = [question("What is this?", (56, 84)), question("And?"), question("", (28, 28))]
    batch = inference_batch(conversations, transform)
    samples = [transform({"messages": messages}, inference=True) for messages in conversations]
    expected = padded_collate(samples, transform.pad_id, padding_side="left")
    assert set(batch) == {"tokens", "input_pos", "placeholder_rows", "mask", "encoder_input"}
    for name in ("tokens", "input_pos", "placeholder_rows", "mask"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 6, 4], [1, 4, 4]]
    # the header of the answer ends every row
    assert len({tuple(row[-2:].tolist()) for row in batch["tokens"]}) == 1


def test_a_batch_goes_to_the_device():
    batch = inference_batch([question("And?")], shapes.tiny_transform(), device="meta")
    assert batch["tokens"].is_meta
    assert batch["input_pos"].is_meta
