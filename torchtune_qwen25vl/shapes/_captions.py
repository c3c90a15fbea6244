"""Captions of images by a trained model, and the share of attributes they name."""

from collections.abc import Sequence

from PIL import Image

from torchtune_qwen25vl.generation import generate, inference_batch
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.shapes._dataset import caption_messages
from torchtune_qwen25vl.shapes._scenes import Scene, random_scene, score
from torchtune_qwen25vl.transform import Qwen25VLTransform

HELD_OUT_SEED = 1_000_003
MAX_NEW_TOKENS = 24
BATCH = 50


def held_out_scenes(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """Make scenes of a seed that no training data should have."""
    return [random_scene((seed << 32) + index) for index in range(count)]


def caption(
    model: Qwen25VL, transform: Qwen25VLTransform, images: Sequence[Image.Image]
) -> list[list[int]]:
    """Caption greedily; captions are tokens, their end included."""
    captions: list[list[int]] = []
    for start in range(0, len(images), BATCH):
        questions = [caption_messages(image) for image in images[start : start + BATCH]]
        batch = inference_batch(questions, transform)
        answers = generate(
            model, batch, max_new_tokens=MAX_NEW_TOKENS, stop_tokens=transform.stop_tokens
        )
        rows = zip(answers.tokens.tolist(), answers.lengths, strict=True)
        captions += [tokens[:length] for tokens, length in rows]
    return captions


def blank(image: Image.Image) -> Image.Image:
    """Make a white image of the same size."""
    return Image.new("RGB", image.size, "white")


def share_right(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Count the attributes named in their place, as a share of all attributes."""
    right = sum(score(said, scene) for said, scene in zip(captions, scenes, strict=True))
    return right / sum(len(scene.attributes) for scene in scenes)
