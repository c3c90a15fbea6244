"""Pixels: photos and videos to patches, bit for bit."""

import math
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from parity import photos, reference
from parity.stages._stage import Measurement, Setting, Stage, max_error, refused
from torchtune_qwen25vl import Qwen25VLImageTransform, Qwen25VLVideoTransform
from torchtune_qwen25vl.transform._patches import IMAGE_MEAN, IMAGE_STD
from torchtune_qwen25vl.transform._processor import read_processor
from torchtune_qwen25vl.weights import find_weights

SMALL: dict[str, Any] = {"max_pixels": 50176}  # 64 placeholders: every photo is shrunk
# in words: how frames are sampled, and limits other than the default
WHOLE_VIDEOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all frames": ({}, {}),
    "64 placeholders": ({}, {"min_pixels": 3136, **SMALL}),
}
SAMPLED_VIDEOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4 frames": ({"num_frames": 4}, {}),
    "2 fps": ({"fps": 2.0}, {}),
}
THUMBNAIL = (240, 240)
FULL_RED = 0.1  # the error that is brightest in a heat map: 7 of 255 levels


def limits(setting: Setting) -> dict[str, dict[str, Any]]:
    """The pixel limits to run under: a checkpoint's own, or the default and small ones."""
    if setting.checkpoint:
        folder = find_weights(setting.checkpoint)[0]
        settings = read_processor(folder)
        del settings["video"]
        return {"the checkpoint's settings": settings}
    return {"default limits": {}, "64 placeholders": SMALL}


def measure_pixels(setting: Setting) -> Iterator[Measurement]:
    """Bundled photos and images that each break some shortcut, under all limits."""
    images = photos.hard_cases()
    if not setting.small:
        images = {name: photos.photo(name) for name in photos.PHOTOS} | images
    for words, options in limits(setting).items():
        transform = Qwen25VLImageTransform(**options)
        processor = reference.image_processor(**options)
        for name, image in images.items():
            case = f"{name}, {words}"
            ours = transform({"image": image})
            try:
                theirs = reference.ask(processor, image, return_tensors="pt")
            except reference.RefusalError as refusal:
                yield refused(case, refusal)
                continue
            yield Measurement(
                case,
                max(
                    max_error(ours["image_grid_thw"], theirs["image_grid_thw"]),
                    max_error(ours["pixel_values"], theirs["pixel_values"]),
                ),
                pictures=_pictures(image, ours, theirs) if name in photos.PHOTOS else (),
            )


def _pictures(image: Image.Image, ours: Any, theirs: Any) -> tuple[tuple[str, Image.Image], ...]:
    """The photo, what our patches hold of it, and where they differ from theirs."""
    small = image.copy()
    small.thumbnail(THUMBNAIL)
    grid_thw, patches = ours["image_grid_thw"], ours["pixel_values"]
    _, rows, columns = grid_thw[0].tolist()
    shown = [
        (f"{image.mode} {image.width} x {image.height}", small),
        (f"our patches, {14 * columns} x {14 * rows}", as_photo(patches, rows, columns)),
    ]
    if patches.shape == theirs["pixel_values"].shape:
        heat = heat_map((patches - theirs["pixel_values"]).abs(), rows, columns)
        shown.append((f"largest error of each patch, red: {FULL_RED} and more", heat))
    return tuple(shown)


def as_photo(patches: Tensor, rows: int, columns: int) -> Image.Image:
    """Return the image that patches of 14 x 14 pixels hold, made small."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    blocks = patches.view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
    values = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, 14 * rows, 14 * columns)
    levels = ((values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    photo = Image.fromarray(numpy.ascontiguousarray(levels.permute(1, 2, 0)))
    photo.thumbnail(THUMBNAIL)
    return photo


def heat_map(errors: Tensor, rows: int, columns: int) -> Image.Image:
    """Draw one square for each patch: black where it is equal, red where it is not."""
    worst = (
        errors.amax(1).view(rows // 2, columns // 2, 2, 2).transpose(1, 2).reshape(rows, columns)
    )
    levels = (255 * (worst / FULL_RED).clamp(0, 1)).ceil().to(torch.uint8)
    red = Image.merge(
        "RGB", [Image.fromarray(levels.numpy())] + 2 * [Image.new("L", (columns, rows))]
    )
    scale = min(THUMBNAIL[0] / columns, THUMBNAIL[1] / rows)
    size = math.ceil(scale * columns), math.ceil(scale * rows)
    return red.resize(size, Image.Resampling.NEAREST)


def pan(name: str, count: int, width: int, height: int) -> list[Image.Image]:
    """A video: a window that moves over a photo."""
    photo = photos.photo(name).convert("RGB")
    steps = numpy.linspace(0, 1, count)
    corners = [
        (int(step * (photo.width - width)), int(step * (photo.height - height))) for step in steps
    ]
    return [photo.crop((x, y, x + width, y + height)) for x, y in corners]


def measure_video_pixels(setting: Setting) -> Iterator[Measurement]:
    """Even and odd numbers of frames, sampled by number and by rate, as PIL images and tensors."""
    videos = {
        "astronaut, 8 frames": pan("astronaut.png", 8, 320, 240),
        "coffee, 5 frames": pan("coffee.png", 5, 131, 77),
        "rocket, 1 frame": pan("rocket.jpg", 1, 222, 333),
    }
    for name, frames in videos.items():
        stack = torch.from_numpy(numpy.stack([numpy.asarray(frame) for frame in frames])).permute(
            0, 3, 1, 2
        )
        ways = WHOLE_VIDEOS | SAMPLED_VIDEOS if len(frames) > 4 else WHOLE_VIDEOS
        for words, (sampling, limits) in ways.items():
            for kind, video in (("PIL images", frames), ("tensor", stack)):
                case = f"{name}, {kind}, {words}"
                ours = Qwen25VLVideoTransform(**sampling, **limits)({"video": video, "fps": 3.0})
                try:
                    values, grid_thw, seconds = reference.ask(
                        reference.video_patches,
                        video,
                        source_fps=3.0,
                        sampling=sampling,
                        limits=limits,
                    )
                except reference.RefusalError as refusal:
                    yield refused(case, refusal)
                    continue
                yield Measurement(
                    case,
                    max(
                        max_error(ours["video_grid_thw"], grid_thw),
                        max_error(ours["pixel_values_videos"], values),
                        abs(ours["second_per_grid_ts"] - seconds),
                    ),
                )


PIXELS = Stage(
    name="pixels",
    what="patches and grid of photos and hard images, against the torchvision processor",
    tolerance="0: the same uint8 resize and the same float32 arithmetic",
    fault="resize in float",
    measure=measure_pixels,
)
VIDEO_PIXELS = Stage(
    name="video pixels",
    what="patches, grid and seconds of videos, frames sampled and repeated",
    tolerance="0: the same uint8 resize, the same float32 arithmetic, the same frames",
    fault="frames of qwen-vl-utils",
    measure=measure_video_pixels,
)
