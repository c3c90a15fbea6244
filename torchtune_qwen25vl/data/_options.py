"""The arguments that all dataset builders have in common."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from torchtune_qwen25vl.media import PIXEL_LIMIT, Downloads, cache_folder


@dataclass(frozen=True)
class Options:
    """Arguments common to all builders, by name.

    Attributes:
        media_root: folder that relative media paths start from, by default that of the source
        boxes: image whose pixels `bbox_2d` and `point_2d` in texts count, the "resized" one (they
            stay as they are) or the "original" one (they are moved)
        prepend_media: whether a row with one image or video, and no place for it, shows it first
        fps: frames that pass in a second of a video that is a list of images or a folder of them,
            where its row does not say so itself; by default transformers' 24, said once in the log
        pixel_limit: width * height above which an image file is refused
        allow_download: whether images and videos are downloaded whose place is an http or https URL
        download_dir: folder that keeps them, by default torchtune_qwen25vl/media in XDG_CACHE_HOME
            or ~/.cache
        skip_bad_rows: report.json of the check command, whose bad rows are left out
        packed: torchtune's switch for its own packing, which keeps no media; must be False

    Raises:
        ValueError: if `boxes` is of no known kind, `packed` is set, or `download_dir` alone.
    """

    media_root: str | None = None
    boxes: Literal["resized", "original"] = "resized"
    prepend_media: bool = False
    fps: float | None = None
    pixel_limit: int = PIXEL_LIMIT
    allow_download: bool = False
    download_dir: str | None = None
    skip_bad_rows: str | None = None
    packed: bool = False

    @property
    def downloads(self) -> Downloads:
        """The folder of what is downloaded."""
        folder = Path(self.download_dir or cache_folder("media"))
        return Downloads(folder.expanduser().absolute())

    def __post_init__(self) -> None:
        if self.boxes not in ("resized", "original"):
            raise ValueError(f"boxes count pixels of 'resized' or 'original', got {self.boxes!r}")
        if self.download_dir is not None and not self.allow_download:
            raise ValueError(
                f"download_dir={self.download_dir!r} means nothing without allow_download=True"
            )
        if self.packed:
            raise ValueError(
                "torchtune's own packing keeps no media, so packed must be False; set collate_fn "
                "to torchtune_qwen25vl.packed_collate instead"
            )


OPTIONS = frozenset(field.name for field in fields(Options))
