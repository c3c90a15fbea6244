"""Files and folders that appear whole or not at all.

Both are made under a hidden name beside their place and renamed into it once they are on disk. A
run that is killed leaves either what was there before or what was to come.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    The hidden name is the same each time: what a killed run left is replaced by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()
    hidden = path.with_name(f".{digest[:16]}.part")
    with hidden.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Make a new folder to fill, which takes the place of `target` when all went well.

    An earlier `target` stays whole until the new folder is on disk, and comes back if the exchange
    fails.
    """
    recover_folders(target.parent)
    building, replaced = _hidden(target, "building"), _hidden(target, "replaced")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        _flush(building)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    if target.exists():
        os.replace(target, replaced)
    try:
        os.replace(building, target)
    finally:
        recover_folders(target.parent)


def recover_folders(parent: Path) -> None:
    """Put back every folder that was moved aside for a new one which never took its place."""
    for replaced in parent.glob(".*.replaced"):
        target = parent / replaced.name.removeprefix(".").removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                os.replace(replaced, target)


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _flush(folder: Path) -> None:
    """Wait until the files are on disk, so that the rename cannot overtake them."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
