"""Embeddings that are computed once and shown several times."""

import pytest
import tiny
import torch


def test_embeddings_shown_again_are_as_good_as_images_encoded_again():
    model, inputs = tiny.model(), tiny.inputs("two images")
    embeds = model(inputs.tokens, encoder_input=inputs.ours["encoder_input"], output="vision")
    assert embeds.shape == (int(inputs.is_placeholder.sum()), 64)
    given = {"input_pos": inputs.positions, "vision_embeds": embeds}
    assert torch.equal(model(inputs.tokens, **given), model(**inputs.ours))
    index = torch.arange(len(embeds))
    reversed_back = {**given, "vision_embeds": embeds.flip(0), "image_index": index.flip(0)}
    assert torch.equal(model(inputs.tokens, **reversed_back), model(**inputs.ours))
    shown = model(**inputs.ours, image_index=index.flip(0))
    assert torch.equal(shown, model(inputs.tokens, **{**given, "vision_embeds": embeds.flip(0)}))
    with pytest.raises(ValueError, match=r"placeholders .* but the encoder returned 42 embeddings"):
        model(inputs.tokens, **{**given, "vision_embeds": embeds[1:]})
    with pytest.raises(ValueError, match="need positions on three axes"):
        model(inputs.tokens, vision_embeds=embeds)


def test_without_media_there_are_none_unless_other_ranks_have_some():
    model, tokens = tiny.model(), tiny.text(1, 5)
    assert model(tokens, output="vision").shape == (0, 64)
    assert not model(tokens, output="vision").requires_grad
    absent = model(tokens, output="vision", encode_absent=True)
    assert absent.shape == (0, 64)
    (model(tokens, vision_embeds=absent, input_pos=torch.zeros(1, 5, 3).long()).sum()).backward()
    gradients = [parameter.grad for parameter in model.vision.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
