"""Pictures and frames to patches: real photos, hard cases, and both published pixel limits."""

from collections.abc import Iterator

import numpy
import torch
from PIL import Image
from torch import Tensor

from parity import photos, reference
from parity.stages._stage import Measurement, Setting, Stage, max_error
from torchtune_qwen25vl import Qwen25VLImageTransform, Qwen25VLVideoTransform
from torchtune_qwen25vl._image_transform import IMAGE_MEAN, IMAGE_STD

LIMITS = {"1 MP cap": (3136, 1003520), "published cap": (3136, 12845056), "tight": (50176, 50176)}
SHOWN = 640  # pixels of the longer side of a picture on the page


def measure_pixels(setting: Setting) -> Iterator[Measurement]:
    """Every picture within the limits of transformers, of the hub, and within tight ones."""
    pictures = {name: photos.photo(name) for name in photos.PHOTOS} | photos.hard_cases()
    for limits, (min_pixels, max_pixels) in _limits(setting).items():
        transform = Qwen25VLImageTransform(min_pixels=min_pixels, max_pixels=max_pixels)
        processor = reference.image_processor(min_pixels, max_pixels)
        for name, picture in pictures.items():
            ours = transform({"image": picture})
            theirs = processor(picture, return_tensors="pt")
            error = max(
                max_error(ours["pixel_values"], theirs["pixel_values"]),
                max_error(ours["image_grid_thw"], theirs["image_grid_thw"]),
            )
            shown = limits == "1 MP cap" and name in photos.PHOTOS
            yield Measurement(
                f"{name}, {limits}",
                error,
                pictures=_pictures(picture, ours, theirs) if shown else (),
            )


def _limits(setting: Setting) -> dict[str, tuple[int, int]]:
    if setting.checkpoint is None:
        return LIMITS
    return {"limits of the checkpoint": reference.pixel_limits(setting.checkpoint)}


def _pictures(picture: Image.Image, ours: dict, theirs: dict) -> tuple:
    resized = as_picture(ours["pixel_values"], ours["image_grid_thw"])
    shown = [
        ("photo", picture),
        (f"as the model sees it, {resized.width} x {resized.height}", resized),
    ]
    if ours["pixel_values"].shape == theirs["pixel_values"].shape:
        difference = (ours["pixel_values"] - theirs["pixel_values"]).abs()
        shown.append(
            ("difference, 1 grey level is white", _heat(difference, ours["image_grid_thw"]))
        )
    return tuple((caption, _thumbnail(image)) for caption, image in shown)


def _raster(patches: Tensor, grid_thw: Tensor) -> Tensor:
    """First frame of patches [p, 1176] as an image [3, h, w]."""
    _, h, w = grid_thw[0].tolist()
    blocks = patches[: h * w].view(h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * 14, w * 14)


def as_picture(patches: Tensor, grid_thw: Tensor) -> Image.Image:
    """What the model sees, back as a picture."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    pixels = (_raster(patches, grid_thw) * std + mean) * 255
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _heat(difference: Tensor, grid_thw: Tensor) -> Image.Image:
    grey_levels = _raster(difference, grid_thw).amax(0) * 255 * min(IMAGE_STD)
    return Image.fromarray((grey_levels * 255).clamp(0, 255).byte().numpy())


def _thumbnail(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((SHOWN, SHOWN))
    return image


def _clip(frames: int, width: int, height: int) -> list[Image.Image]:
    """Frames of a camera that pans over a photo."""
    photo = photos.photo("motorcycle_left.png").convert("RGB")
    return [photo.crop((9 * k, 5 * k, 9 * k + width, 5 * k + height)) for k in range(frames)]


def measure_video_pixels(setting: Setting) -> Iterator[Measurement]:
    """Videos of odd and even length, sampled and not, within several limits."""
    cases = {
        "8 frames": (_clip(8, 320, 240), {}, {}),
        "odd number of frames": (_clip(5, 200, 300), {}, {}),
        "one frame": (_clip(1, 111, 222), {}, {}),
        "2 fps of 30 fps": (_clip(45, 160, 120), {"fps": 2.0}, {"fps": 30.0}),
        "6 of 17 frames": (_clip(17, 160, 120), {"num_frames": 6}, {"fps": 25.0}),
    }
    for name, (frames, sampling, source) in cases.items():
        ours = Qwen25VLVideoTransform(**sampling)({"video": frames, **source})
        arrays = [numpy.asarray(frame) for frame in frames]
        patches, grid_thw, seconds = reference.video_patches(
            arrays, source_fps=source.get("fps"), sampling=sampling or None
        )
        error = max(
            max_error(ours["pixel_values_videos"], patches),
            max_error(ours["video_grid_thw"], grid_thw),
            max_error(float(ours["second_per_grid_ts"]), float(seconds)),
        )
        yield Measurement(name, error)


PIXELS = Stage(
    name="pixels",
    what="patches of 12 photos and 14 hard cases, against the default image processor",
    tolerance="0: torch.equal",
    fault="resize without antialiasing",
    measure=measure_pixels,
)
VIDEO_PIXELS = Stage(
    name="video pixels",
    what="patches, grids and seconds of videos, against the default video processor",
    tolerance="0: torch.equal",
    fault="last frame not repeated",
    measure=measure_video_pixels,
)
