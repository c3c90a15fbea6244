"""Which files of a folder are images to work on; all others are counted, each by the reason."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.media._images import LACKING, SUFFIXES, is_image

HIDDEN = ("@eaDir",)  # where a NAS keeps its thumbnails; and every name that begins with a dot
MASK = "-masklabel"  # what the name of a trainer's mask ends in
OWN_FILE = "journal-0.jsonl"  # in the folder of a job
THUMBNAILS = "thumbnails"  # folder in that of a job


def images_in(
    folder: Path, sieve: "Sieve", *, recursive: bool, report: Callable[[OSError], None]
) -> Iterator[Path]:
    """Yield the images of a folder by name.

    Links to folders are followed, each real folder is looked into once.

    Args:
        folder: where to begin
        sieve: says which files are taken
        recursive: look into its folders
        report: called with why a folder cannot be read
    """
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=report):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        inner = Path(here).relative_to(folder)
        folders[:] = sorted(folders) if recursive else []
        folders[:] = [name for name in folders if sieve.takes_folder(inner / name)]
        if OWN_FILE in files:  # beside results of a job; they are not left out, they are its own
            folders[:] = [name for name in folders if name != THUMBNAILS]
            files = [name for name in files if Path(name).suffix.lower() in SUFFIXES]
        images = (name for name in sorted(files) if sieve.takes_file(inner / name, folder))
        yield from (Path(here, name) for name in images)


def frames_in(source: Any, root: Path | None = None) -> list[Path] | None:
    """Return the images of a folder that is a video, 2.jpg before 10.jpg; None if it is no folder.

    Args:
        source: where a video lies, see `locate`
        root: folder that relative paths start from

    Raises:
        ValueError: naming the folder, if it has no images.
    """
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, str | PathLike) or (root is None and not Path(path).is_absolute()):
        return None
    folder = Path(root or "", path)
    try:
        if not folder.is_dir():
            return None
    except OSError:  # a name that is too long; whoever opens it says so
        return None
    shown = [one for one in folder.iterdir() if not one.name.startswith(".")]
    frames = [one for one in shown if one.suffix.lower() in (*SUFFIXES, *LACKING)]
    if not frames:
        raise ValueError(f"{folder}: a folder is a video of its images, but it has none")
    return sorted(frames, key=_naturally)


def _naturally(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return what puts a name with 2 before one with 10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces], path.name


@dataclass
class Sieve:
    """Which files of folders are worked on; the others are counted, each by the reason.

    Attributes:
        exclude: patterns of names that are left out, or of paths from the input on
        text_suffix: of what belongs to an image, and is not counted
        left_out: number of files and folders by reason
    """

    exclude: Sequence[str] = ()
    text_suffix: str = ".txt"
    left_out: Counter[str] = field(default_factory=Counter)

    def takes_folder(self, path: Path) -> bool:
        """Whether a folder is looked into; `path` starts behind the input."""
        return self._take(self._reason(path))

    def takes_file(self, path: Path, root: Path) -> bool:
        """Whether a file is an image to work on; `path` starts behind the input `root`."""
        reason, suffix = self._reason(path), path.suffix.lower()
        if suffix in (".txt", self.text_suffix.lower()):
            return False
        if suffix in LACKING:
            reason = reason or f"{suffix} (install the extra {LACKING[suffix]})"
        elif not reason and not suffix and not _is_nameless_image(root / path):
            reason = "without a suffix"
        elif not reason and suffix and suffix not in SUFFIXES:
            reason = suffix
        elif not reason and path.stem.lower().endswith(MASK):
            reason = f"masks ({MASK})"
        return self._take(reason)

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))

    def _reason(self, path: Path) -> str:
        around = [path, *path.parents][:-1]  # a pattern may lead into a folder that is left out
        if any(one.name.startswith(".") or one.name in HIDDEN for one in around):
            return "hidden"
        names = [name for one in around for name in (one.name, one.as_posix())]
        is_excluded = any(fnmatchcase(name, one) for name in names for one in self.exclude)
        return "excluded" if is_excluded else ""

    def _take(self, reason: str) -> bool:
        if reason:
            self.left_out[reason] += 1
        return not reason


def _is_nameless_image(path: Path) -> bool:
    return path.is_file() and is_image(path)  # opening a pipe would wait for its other end
