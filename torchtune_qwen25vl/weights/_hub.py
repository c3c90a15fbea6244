"""Checkpoints from the hub: huggingface_hub fetches them, again and again when the network fails.

A file that is complete on disk is not fetched twice. A file that the program was stopped in is
begun anew by huggingface_hub.
"""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)

T = TypeVar("T")

QWEN_HOME = "QWEN_HOME"
WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
OF_PIPELINES = ("transformer/*", "transformer_2/*", "vae/*", "unet/*")  # what they have besides
ROOM = 256 << 20  # bytes that must stay free on the disk
WAITS = (2.0, 8.0, 30.0, 60.0)  # seconds before each further attempt
OF_FILES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt"}  # no repository's, a file's


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Say whether `source` can be the id of a repository (`owner/name`), and is no path here."""
    name = str(source)
    if name.count("/") != 1 or Path(name).suffix in OF_FILES or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return where downloads go: `cache_dir`, else QWEN_HOME, else huggingface_hub's folder."""
    return Path(cache_dir or os.environ.get(QWEN_HOME) or constants.HF_HUB_CACHE).expanduser()


def missing_bytes(
    source: str,
    cache: Path,
    endpoint: str | None = None,
    without: Sequence[str] = OF_PIPELINES,
) -> int | None:
    """Return the bytes of a checkpoint that a cache lacks; None if the hub cannot be asked."""
    try:
        return _missing_bytes(source, cache, endpoint, without)
    except Exception as error:  # of the HTTP library too, whichever it is
        logger.warning("the hub cannot be asked about %s: %s", source, _first_line(error))
        return None


def _missing_bytes(
    source: str, cache: Path, endpoint: str | None, without: Sequence[str] = OF_PIPELINES
) -> int:
    files = snapshot_download(
        source,
        cache_dir=cache,
        allow_patterns=WANTED,
        ignore_patterns=list(without),
        endpoint=endpoint,
        dry_run=True,
    )
    return sum(file.file_size or 0 for file in files if file.will_download)


def _refuse_unreachable(source: str, cache: Path, endpoint: str | None) -> None:
    """Refuse a checkpoint of which nothing is here, where no connection is made to the hub.

    This is a machine without a network, or a mistyped folder; a download that was begun is worth
    waiting for.
    """
    if (cache / repo_folder_name(repo_id=source, repo_type="model")).exists():
        return
    try:
        _missing_bytes(source, cache, endpoint)
    except Exception as error:  # of the HTTP library too, whichever it is
        if _is_of(error, "ConnectError"):
            raise ValueError(f"{source} cannot be fetched: {_first_line(error)}") from error


def bytes_to_fetch(
    source: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
) -> int | None:
    """Return the bytes that `fetch` would download; None if the hub cannot be asked."""
    return missing_bytes(str(source), cache_folder(cache_dir)) if is_hub_id(source) else 0


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fetch(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    without: Sequence[str] = OF_PIPELINES,
    endpoint: str | None = None,
    waits: tuple[float, ...] = WAITS,
    compare: bool = True,
) -> Path:
    """Return the path of a model, after downloading it if `source` is a hub id.

    Server errors and failing connections are tried again; 401, 403 and 404 are not. Downloaded
    files are verified by the hub's checksums. If the hub cannot be reached, a complete copy in the
    cache is used.

    Args:
        source: folder, .safetensors file or hub id
        cache_dir: folder of downloads, see `cache_folder`
        without: patterns of files that are left out; by default those of a diffusers pipeline that
            are not its text encoder's
        endpoint: address of the hub; huggingface_hub's own by default
        waits: seconds before each further attempt
        compare: whether to compare with the hub's checksums what has not been compared yet

    Raises:
        ValueError: if the model cannot be had, the disk is too small for it, or a file is not what
            the hub says it is.
    """
    if not is_hub_id(source):
        return Path(source).expanduser()
    source, cache = str(source), cache_folder(cache_dir)
    missing, free = missing_bytes(source, cache, endpoint, without), free_bytes(cache)
    if missing is None:
        _refuse_unreachable(source, cache, endpoint)
    if missing:
        logger.info("fetching %.2f GB of %s to %s", missing / 1e9, source, cache)
    if missing and missing + ROOM > free:
        raise ValueError(
            f"{source} has {missing / 1e9:.2f} GB to fetch and there are {free / 1e9:.2f} GB free "
            f"at {cache}: make room, or set QWEN_HOME to a folder on a larger disk"
        )
    folder = _tried(source, waits, lambda: _snapshot(source, cache, endpoint, without))
    if not compare:
        return folder
    verified = folder.parents[1] / f"verified-{folder.name}"
    if missing is None:
        logger.warning("%s is taken from %s, not compared with the hub's checksums", source, folder)
    elif missing or not verified.exists():
        logger.info("comparing %s with the hub's checksums", source)
        _tried(source, waits, lambda: _verify(source, folder, cache, endpoint))
        with contextlib.suppress(OSError):  # a cache that may only be read is compared each time
            verified.touch()
    return folder


def _snapshot(source: str, cache: Path, endpoint: str | None, without: Sequence[str]) -> Path:
    return Path(
        snapshot_download(
            source,
            cache_dir=cache,
            allow_patterns=WANTED,
            ignore_patterns=list(without),
            endpoint=endpoint,
            max_workers=4,
        )
    )


def _tried(source: str, waits: tuple[float, ...], fetch: Callable[[], T]) -> T:
    for wait in (*waits, None):
        try:
            return fetch()
        except Exception as error:  # of the HTTP library too, whichever it is
            if wait is None or not is_transient(error):
                raise ValueError(f"{source} cannot be fetched: {_first_line(error)}") from error
            logger.warning(
                "%s: %s; again in %g s, complete files are kept", source, _first_line(error), wait
            )
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def is_transient(error: BaseException) -> bool:
    """Say whether the same request may succeed later: the server or the connection failed."""
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
    return _is_of(error, "TransportError", "ConnectionError", "TimeoutError")


def _is_of(error: BaseException, *names: str) -> bool:
    """Say whether an error, or what caused it, is of a class of one of these names."""
    kinds = (kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__)
    return not set(names).isdisjoint(kinds)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _verify(source: str, folder: Path, cache: Path, endpoint: str | None) -> None:
    verification = HfApi(endpoint=endpoint).verify_repo_checksums(
        source, cache_dir=cache, revision=folder.name
    )
    damaged = [mismatch["path"] for mismatch in verification.mismatches]
    if not damaged:
        return
    remedy = "they are deleted, start again to fetch them"
    try:
        for path in (folder / name for name in damaged):
            if (blob := path.resolve()).is_relative_to(folder.parents[1].resolve() / "blobs"):
                blob.unlink(missing_ok=True)  # it would be taken for the file again
            path.unlink(missing_ok=True)
    except OSError as error:
        remedy = f"delete them from {folder} ({error})"
    raise ValueError(
        f"{', '.join(damaged)} of {source} differed from the hub's checksums: {remedy}"
    )
