"""Files that may be compressed: .gz and .zst at the end of a name."""

import gzip
import zlib
from pathlib import Path

import pyarrow as pa

SUFFIXES_OF_COMPRESSION = (".gz", ".zst")


def suffix_within(path: Path) -> str:
    """Return the suffix of what a file holds, in small letters: .jsonl of rows.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in SUFFIXES_OF_COMPRESSION else suffix


def read_content(path: Path) -> bytes:
    """Read a file, decompressed if its name says that it is compressed.

    Raises:
        ValueError: naming the file, if it is not what its name says, or cut short.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES_OF_COMPRESSION:
        return path.read_bytes()
    try:
        if suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        with pa.input_stream(str(path), compression="zstd") as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed as {suffix} ({error})") from error
