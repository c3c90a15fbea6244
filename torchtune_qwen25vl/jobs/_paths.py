"""Texts and patterns as paths."""

import os
from pathlib import Path


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
