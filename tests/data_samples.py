"""Pictures, files and a transform that the tests of `data` share."""

import functools
import json

import av
import numpy as np
from PIL import Image

from parity import vocabulary
from torchtune_qwen25vl.transform._transform import Qwen25VLTransform

SAYINGS = (
    "You are a helpful assistant. What is this? A red apple. Who are they? Describe this image.",
    'Find the dog and report the "bbox_2d": [135, 114, 1016, 672] in JSON format.',
)


@functools.cache
def transform(**arguments):
    return Qwen25VLTransform(vocabulary.small(SAYINGS) / "tokenizer.json", **arguments)


def picture(width=56, height=84, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_pictures(folder, *names, **size):
    """Saves a picture of its own under each name and returns what a reader should see of them."""
    pictures = []
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pictures.append(picture(seed=seed, **size))
        pictures[-1].save(folder / name, lossless=True)
    return pictures


def save_video(path, num_frames=10, fps=5, **options):
    """A film whose k-th frame is of grey 20 * k (modulo 250), with a red corner at the top left."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(num_frames):
            pixels = np.full((48, 64, 3), 20 * k % 250, dtype=np.uint8)
            pixels[:16, :16] = [255, 0, 0]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_json(path, *rows):
    path.write_text(json.dumps(rows))
    return str(path)


def messages_of(dataset, index=0):
    """The messages of a row as plain data: role, parts, and whether it is trained on."""
    read = dataset._read(dataset.rows[index])["messages"]
    return [
        (message.role, [_plain(part) for part in message.content], not message.masked)
        for message in read
    ]


def _plain(part):
    if part["type"] == "text":
        return part["content"]
    if part["type"] == "image":
        return np.asarray(part["content"]).tobytes()
    return [part.get("fps"), *(frame.size for frame in part["content"])]


def seen(image):
    """What `messages_of` shows for a picture."""
    return np.asarray(image).tobytes()
