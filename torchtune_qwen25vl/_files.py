"""Files and folders that appear whole or not at all, and settings in JSON.

Both are made under a hidden name beside their place and renamed into it once they are on disk. A
run that is killed leaves either what was there before or what was to come.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPARE = 1 << 20  # free bytes below which a disk is full for whoever writes more than that


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: naming the file, if it is not JSON or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds one {type(content).__name__}, not settings; fetch it again")
    return content


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

    Raises:
        OSError: if the disk is full, whatever the library that found out has raised.
    """
    recover_folders(target.parent)
    building, replaced = _hidden(target, "building"), _hidden(target, "replaced")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        with naming_full_disk(target):
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


@contextlib.contextmanager
def naming_full_disk(target: Path) -> Iterator[None]:
    """Turn every error for which a full disk is the reason into one that says so.

    torch and safetensors raise errors of their own, and not all of them tell the reason.

    Raises:
        OSError: naming `target`, if the disk is full.
    """
    try:
        yield
    except BaseException as error:
        told = "no space left" in str(error).lower() or getattr(error, "errno", 0) == errno.ENOSPC
        if not told and not (isinstance(error, RuntimeError) and _free(target) < SPARE):
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left on the disk of {target}, which was not written; what was there before "
            "is whole. Free some space and start again",
        ) from error


def recover_folders(parent: Path) -> None:
    """Put back every folder that was moved aside for a new one which never took its place."""
    for replaced in parent.glob(".*.replaced"):
        target = parent / replaced.name.removeprefix(".").removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                os.replace(replaced, target)


def _free(target: Path) -> int:
    """Return the free bytes of the disk of a path that may not be there yet."""
    return shutil.disk_usage(next(p for p in target.absolute().parents if p.exists())).free


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _flush(folder: Path) -> None:
    """Wait until the files are on disk, so that the rename cannot overtake them."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
