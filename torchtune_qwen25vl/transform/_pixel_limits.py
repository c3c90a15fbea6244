"""The pixel limits of a checkpoint's image processor, in any of the forms transformers writes them.

The hub's files have `min_pixels` and `max_pixels` in preprocessor_config.json. Newer versions save
`size` with `shortest_edge` and `longest_edge` (numbers of pixels all the same), or the whole
processor in processor_config.json, which then goes before preprocessor_config.json.
"""

import json
from pathlib import Path
from typing import Any

EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def read_pixel_limits(folder: Path) -> dict[str, int]:
    """The limits a folder's image processor has of its own: `min_pixels`, `max_pixels`.

    Raises:
        ValueError: if the folder has no image processor.
    """
    if (path := _settings_path(folder)) is None:
        raise ValueError(
            f"{folder} has no preprocessor_config.json, so the pixel limits are unknown: "
            f"fetch it from the original checkpoint"
        )
    settings = json.loads(path.read_text())
    settings = settings.get("image_processor", settings)
    size = settings.get("size") or {}
    limits = {limit: settings.get(limit) or size.get(edge) for limit, edge in EDGES.items()}
    return {limit: pixels for limit, pixels in limits.items() if pixels is not None}


def write_pixel_limits(folder: Path, **limits: int | None) -> None:
    """Write the limits that are given into a folder's image processor, made if there is none."""
    given = {limit: pixels for limit, pixels in limits.items() if pixels is not None}
    if not given:
        return
    path = _settings_path(folder) or folder / "preprocessor_config.json"
    new: dict[str, Any] = {"image_processor_type": "Qwen2VLImageProcessor"}
    whole = json.loads(path.read_text()) if path.exists() else new
    settings = whole.get("image_processor", whole)
    settings |= given
    if settings.get("size"):
        settings["size"] |= {EDGES[limit]: pixels for limit, pixels in given.items()}
    path.write_text(json.dumps(whole, indent=2) + "\n")


def _settings_path(folder: Path) -> Path | None:
    """The file in force."""
    processor, image = folder / "processor_config.json", folder / "preprocessor_config.json"
    if processor.exists() and "image_processor" in json.loads(processor.read_text()):
        return processor
    return image if image.exists() else None
