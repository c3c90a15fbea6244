"""Images and videos of http and https, kept in a folder: each is fetched once, whole or not at all.

Processes may share the folder. A download is tried again where the server or the way to it failed;
what a server says is not there is asked for once.
"""

import hashlib
import http.client
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from torchtune_qwen25vl.media._kept import keep

TRIES = 3
PAUSE = 1.0  # seconds before the second try, twice as many before the third
SILENCE = 20.0  # seconds for which a server may send nothing
WHOLE = 300.0  # seconds that one try may take
SIZE_LIMIT = 256 << 20  # bytes of one file
CHUNK = 1 << 16
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # states that may be others in a moment


class _Failed(Exception):
    """A try that failed for a reason that may pass."""


def url_of(source: Any) -> str | None:
    """Return the http or https URL of a source of `locate`, None if it is no such thing."""
    if isinstance(source, Mapping) and source.get("bytes") is None:
        source = source.get("path")
    is_url = isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE)
    return source if is_url else None


@dataclass(frozen=True)
class Downloads:
    """A folder of what was downloaded.

    Attributes:
        folder: is made when it is needed
    """

    folder: Path

    def path_of(self, url: str) -> Path:
        """Return where a URL is kept."""
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        suffix = Path(urlsplit(url).path).suffix.lower()
        kept = suffix if re.fullmatch(r"\.[a-z0-9]{2,5}", suffix) else ""
        return self.folder / name[:2] / f"{name}{kept}"

    def fetch(self, url: str) -> Path:
        """Return the file of a URL, after downloading it if it is not there.

        Raises:
            ValueError: naming the URL, if that fails, takes too long, or it is too large.
        """
        path = self.path_of(url)
        if path.is_file():
            return path
        for number in range(TRIES):
            time.sleep(PAUSE * number)
            try:
                keep(path, _chunks(url), hidden=f".{uuid.uuid4().hex}.part")
                return path
            except _Failed as error:
                reason = error
        raise ValueError(f"{url}: cannot be downloaded, {TRIES} times: {reason}") from reason


def _chunks(url: str) -> Iterator[bytes]:
    """Yield the content of a URL.

    Raises:
        _Failed: if it may be there at another time.
        ValueError: naming the URL, if it will not.
    """
    start, length = time.monotonic(), 0
    try:
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = Request(address, headers={"User-Agent": "torchtune-qwen25vl"})
        with urlopen(request, timeout=SILENCE) as answer:
            while chunk := answer.read(CHUNK):
                length += len(chunk)
                if length > SIZE_LIMIT:
                    raise ValueError(f"{url}: more than {SIZE_LIMIT} bytes; download it yourself")
                if time.monotonic() - start > WHOLE:
                    raise _Failed(f"it takes more than {WHOLE:.0f} s")
                yield chunk
            promised = answer.headers.get("Content-Length")
    except HTTPError as error:
        if error.code in _PASSING:
            raise _Failed(f"the server says {error.code} {error.reason}") from error
        raise ValueError(
            f"{url}: cannot be downloaded, the server says {error.code} {error.reason}; mend the "
            "row or leave it out"
        ) from error
    except (URLError, http.client.HTTPException, OSError) as error:
        raise _Failed(str(getattr(error, "reason", error)) or repr(error)) from error
    if promised is not None and int(promised) != length:
        raise _Failed(f"{length} of {promised} bytes came")
