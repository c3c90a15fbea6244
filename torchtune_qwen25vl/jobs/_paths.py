"""Texts and patterns as paths, and which files of a folder are worked on."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from torchtune_qwen25vl.media import LACKING, SUFFIXES, is_image

HIDDEN = ("@eaDir",)  # where a NAS keeps its thumbnails; and every name that begins with a dot
MASK = "-masklabel"  # what the name of a trainer's mask ends in


def as_path(text: str) -> Path:
    """Make a path of a text that may hold anything.

    Raises:
        ValueError: if it cannot be one.
    """
    try:
        path = Path(text).expanduser()
        os.fsencode(path)  # not of half a character
    except (RuntimeError, ValueError) as error:  # the home of nobody
        raise ValueError(f"{text[:200]!a} is no path: {error}") from error
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text[:200]!a} is no path")
    return path


def folder_of(pattern: Path) -> Path:
    """Return the last folder of a pattern that is there; its own name may hold `[ ] * ?`."""
    while not pattern.is_dir():
        pattern = pattern.parent
    return pattern


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
