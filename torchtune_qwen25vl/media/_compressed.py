"""Files that may be compressed: .gz and .zst at the end of a name."""

import gzip
import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from torchtune.utils import get_logger, log_rank_zero

from torchtune_qwen25vl._lock import locked
from torchtune_qwen25vl.media._kept import keep

SUFFIXES_OF_COMPRESSION = (".gz", ".zst")
CHUNK = 1 << 20  # bytes that are decompressed at a time
PAUSE = 0.2  # seconds between two looks at what another process unpacks


def suffix_within(path: Path) -> str:
    """Return the suffix of what a file holds, in small letters: .jsonl of rows.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in SUFFIXES_OF_COMPRESSION else suffix


def cache_folder(name: str) -> Path:
    """Return a folder of this package in XDG_CACHE_HOME, or else in ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (cache.expanduser() / "torchtune_qwen25vl" / name).absolute()


def read_content(path: Path) -> bytes:
    """Read a file, decompressed if its name says that it is compressed.

    Raises:
        ValueError: naming the file, if it is not what its name says, or cut short.
    """
    return b"".join(_chunks(path)) if _is_compressed(path) else path.read_bytes()


def content_or_file(path: Path, most: int) -> bytes | Path:
    """Read a file as `read_content` does; of one that holds more, return where it lies unpacked.

    A file that is compressed is unpacked once, into a folder of the cache, and again if it changes.

    Args:
        path: the file
        most: number of bytes that are read

    Raises:
        ValueError: naming the file, if it is not what its name says, or cut short.
    """
    if not _is_compressed(path):
        return path if path.stat().st_size > most else path.read_bytes()
    kept = _place(path)
    if kept.is_file():
        return kept
    content = bytearray()
    for chunk in _chunks(path):
        content += chunk
        if len(content) > most:
            _wait_for(path, kept)
            return kept
    return bytes(content)


def _place(path: Path) -> Path:
    """Return where a file, as it is now, lies unpacked."""
    stat = path.stat()
    state = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    name = hashlib.sha256(state.encode()).hexdigest()[:16]
    return cache_folder("unpacked") / f"{path.name}-{name}"


def _wait_for(path: Path, kept: Path) -> None:
    """Unpack a file, or wait until another process has done so."""
    log_rank_zero(get_logger("INFO"), f"{path} is unpacked, once, into {kept}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    while not kept.is_file():
        with locked(kept.with_name(f".{kept.name}.lock")) as is_ours:
            if is_ours and not kept.is_file():
                _unpack(path, kept)
        if not is_ours:
            time.sleep(PAUSE)


def _unpack(path: Path, kept: Path) -> None:
    """Write a file whole or not at all."""
    keep(kept, _chunks(path), hidden=f".{kept.name}.part")


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES_OF_COMPRESSION


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield what a compressed file holds.

    Raises:
        ValueError: naming the file, if it is not what its name says, or cut short.
    """
    suffix = path.suffix.lower()
    try:
        with _opened(path, suffix) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed as {suffix} ({error})") from error


def _opened(path: Path, suffix: str) -> Any:
    return gzip.open(path) if suffix == ".gz" else pa.input_stream(str(path), compression="zstd")
