"""Where an image or video lies: a path, bytes, a data URL, or the dict that `datasets` keeps."""

import base64
import binascii
import re
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def locate(source: Any, root: Path | None = None) -> tuple[str, Path | bytes]:
    """Turn any accepted source into a name for messages and either a file or its bytes.

    Args:
        source: a path (`str` or path-like), a `file://` URL, a `data:` URL, `bytes`,
            or a `{"bytes": ..., "path": ...}` mapping as `datasets` stores media
        root: folder that relative paths start from; None allows absolute paths only

    Raises:
        ValueError: if the source is of another kind, is a remote URL, or names no file.
    """
    if isinstance(source, bytes):
        return f"{len(source)} bytes", _filled(f"{len(source)} bytes", source)
    if isinstance(source, Mapping):
        return _from_mapping(source, root)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _from_data_url(source)
    if isinstance(source, str | PathLike):
        path = _path(fspath(source), root)
        return str(path), path
    raise ValueError(
        "media must be a path, bytes, a data URL or a {'bytes', 'path'} mapping, "
        f"got {type(source).__name__}"
    )


def _from_mapping(source: Mapping[str, Any], root: Path | None) -> tuple[str, Path | bytes]:
    data, path = source.get("bytes"), source.get("path")
    if data is not None:
        name = f"{path or 'unnamed'} ({len(data)} bytes held in the row)"
        return name, _filled(name, data)
    if path is None:
        raise ValueError(f"a media mapping needs 'bytes' or 'path', got keys {sorted(source)}")
    return locate(path, root)


def _from_data_url(url: str) -> tuple[str, bytes]:
    """Read a `data:` URL in any form of RFC 2397: base64 or percent-encoded, wrapped or not."""
    header, comma, payload = url.partition(",")
    name = f"data URL {header[:60]!r}"
    if not comma:
        raise ValueError(f"{name}: a data URL has a comma before its data, this one has none")
    data = unquote_to_bytes(payload)
    if not re.search(r";\s*base64\s*$", header, re.IGNORECASE):
        return name, _filled(name, data)
    text = b"".join(data.split()).rstrip(b"=")
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: its base64 text is damaged ({error})") from error
    return name, _filled(name, data)


def _path(text: str, root: Path | None) -> Path:
    if text.startswith("file://"):
        text = url2pathname(unquote(urlsplit(text).path))
    elif _REMOTE.match(text):
        raise ValueError(f"{text}: URLs are not fetched while training; download the file first")
    path = Path(text)
    if not path.is_absolute():
        if root is None:
            raise ValueError(f"{path} is a relative path and there is no media_root to start from")
        path = root / path
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise ValueError(f"{text[:200]}: cannot be a file here ({error.strerror})") from error
    if size is None:
        raise ValueError(f"{path}: no such file")
    if size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    return path


def _filled(name: str, data: bytes) -> bytes:
    if not data:
        raise ValueError(f"{name}: there are no bytes to decode")
    return data
