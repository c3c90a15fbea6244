"""The processor settings of a checkpoint, in any of the forms transformers writes them.

About images, the hub's files have `min_pixels` and `max_pixels` in preprocessor_config.json. Newer
versions save `size` with `shortest_edge` and `longest_edge` (numbers of pixels all the same). About
videos, video_preprocessor_config.json says the same and how frames are sampled. The whole
processor may also stand in processor_config.json, which then goes before both.

What changes pixels and is not computed here is refused by name. Where a checkpoint says nothing
about videos, they have the normalisation of its images and the pixel limits of
`Qwen25VLVideoTransform`; transformers takes the images' limits then, which published checkpoints
set to 16384 placeholders for every two frames.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtune_qwen25vl._files import read_object
from torchtune_qwen25vl.transform._geometry import (
    PATCH_SIZE,
    PLACEHOLDER_PIXELS,
    SPATIAL_MERGE_SIZE,
    TEMPORAL_PATCH_SIZE,
)
from torchtune_qwen25vl.transform._video import check_sampling

Settings = Mapping[str, Any]

IMAGES = ("image_processor", "preprocessor_config.json")
VIDEOS = ("video_processor", "video_preprocessor_config.json")
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
BICUBIC = 3  # of PIL.Image.Resampling
GEOMETRY = {
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "merge_size": SPATIAL_MERGE_SIZE,
}
COMPUTED = {  # the one value of what pixels depend on beside the settings that are read
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    **GEOMETRY,
}
FAMILY = ("Qwen2VL", "Qwen2_5_VL")  # of the processors whose pixels these are
MAX_VIDEO_TOKENS = 128_000  # where cap_pixels_per_frame is set without another number


def read_processor(folder: Path) -> dict[str, Any]:
    """Read the settings of a folder's processor as arguments of `Qwen25VLTransform`.

    Returns:
        Those of min_pixels, max_pixels, image_mean and image_std that the folder has, and "video",
        arguments of `Qwen25VLVideoTransform`.

    Raises:
        ValueError: if the folder has no image processor, or a setting is not what is computed here.
    """
    if (found := _find(folder, *IMAGES)) is None:
        raise ValueError(
            f"{folder} has no preprocessor_config.json, so the pixel limits are unknown: "
            f"fetch it from the original checkpoint"
        )
    _check_geometry(folder)
    images = _pixels(*found)
    if (found := _find(folder, *VIDEOS)) is None:
        normalisation = {name: images[name] for name in images if name not in EDGES}
        return {**images, "video": normalisation}
    return {**images, "video": _pixels(*found) | _frames(*found)}


def _check_geometry(folder: Path) -> None:
    """Refuse a model whose vision encoder takes other patches than are made here."""
    path = folder / "config.json"
    vision = read_object(path).get("vision_config") if path.exists() else None
    if isinstance(vision, dict):
        merge = vision.get("spatial_merge_size", SPATIAL_MERGE_SIZE)
        _check_computed(path, {**vision, "merge_size": merge}, GEOMETRY)


def write_pixel_limits(folder: Path, **limits: int | None) -> None:
    """Write the limits that are given into a folder's image processor, made if there is none."""
    given = {limit: pixels for limit, pixels in limits.items() if pixels is not None}
    if not given:
        return
    path, settings = _find(folder, *IMAGES) or (
        folder / IMAGES[1],
        {"image_processor_type": "Qwen2VLImageProcessor"},
    )
    settings = settings | given
    if settings.get("size"):
        settings["size"] = settings["size"] | {EDGES[name]: given[name] for name in given}
    whole = read_object(path) | {IMAGES[0]: settings} if path.name != IMAGES[1] else settings
    path.write_text(json.dumps(whole, indent=2) + "\n")


def _find(folder: Path, key: str, name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the file in force and its settings, of images or of videos."""
    processor, own = folder / "processor_config.json", folder / name
    if processor.exists() and (settings := read_object(processor).get(key)) is not None:
        return processor, _checked(processor, key, settings, "settings", isinstance(settings, dict))
    return (own, read_object(own)) if own.exists() else None


def _pixels(path: Path, settings: Settings) -> dict[str, Any]:
    """Return the pixel limits and the normalisation that settings have, the rest being as here."""
    for kind in ("image_processor_type", "video_processor_type"):
        name = settings.get(kind) or FAMILY[0]
        known = str(name).startswith(FAMILY)
        _checked(path, kind, name, f"one that begins with {' or '.join(FAMILY)}", known)
    _check_computed(path, settings, COMPUTED)
    size = settings.get("size") or {}
    if not isinstance(size, dict) or (size and not {*EDGES, *EDGES.values()} & size.keys()):
        raise ValueError(
            f"{path} says size = {size!r}, but images are resized to a number of pixels; it has "
            "shortest_edge and longest_edge, or min_pixels and max_pixels"
        )
    arguments: dict[str, Any] = {}
    for limit, edge in EDGES.items():
        said = (settings.get(limit), size.get(edge), size.get(limit))
        if (pixels := next((value for value in said if value is not None), None)) is not None:
            arguments[limit] = _checked(
                path, limit, pixels, "a whole number above 0", type(pixels) is int and pixels > 0
            )
    for name in ("image_mean", "image_std"):
        if name in settings:
            values = settings[name]
            fits = isinstance(values, list) and len(values) == 3
            fits = fits and all(type(v) in (int, float) and math.isfinite(v) for v in values)
            fits = fits and (name == "image_mean" or min(values) > 0)
            arguments[name] = _checked(path, name, values, "a number for each of 3 channels", fits)
    return arguments


def _check_computed(path: Path, settings: Settings, computed: Settings) -> None:
    for name, value in computed.items():
        if (given := settings.get(name, value)) != value:
            raise ValueError(
                f"{path} says {name} = {given!r}, but pixels are made with {value!r} only; "
                "use a checkpoint with that setting"
            )


def _checked(path: Path, name: str, value: Any, rule: str, fits: bool) -> Any:
    if not fits:
        raise ValueError(f"{path} says {name} = {value!r}, but it is {rule}; correct the file")
    return value


def _frames(path: Path, settings: Settings) -> dict[str, Any]:
    """Return how many frames of a video are kept, and how many pixels they may have together."""
    for switch in ("do_sample_frames", "cap_pixels_per_frame"):
        value = settings.get(switch)
        _checked(path, switch, value, "true or false", value in (True, False, None))
    names = ["min_frames", "max_frames"]
    if settings.get("do_sample_frames"):
        names += ["num_frames", "fps"]
    arguments = {name: settings[name] for name in names if settings.get(name) is not None}
    try:
        check_sampling(**arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if settings.get("cap_pixels_per_frame"):
        tokens = settings.get("max_video_tokens") or MAX_VIDEO_TOKENS
        fits = isinstance(tokens, int) and tokens > 0
        _checked(path, "max_video_tokens", tokens, "a whole number above 0", fits)
        arguments["total_pixels"] = int(tokens * PLACEHOLDER_PIXELS * 0.9)
    return arguments
