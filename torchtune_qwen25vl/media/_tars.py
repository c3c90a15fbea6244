"""Tar files as WebDataset has them: members whose names begin alike are a row.

`0001.jpg`, `0001.json` and `0001.txt` are one row. Keys of the .json are keys of the row, and a
text is under its suffix. Images and videos are under "image" and "video", a list where there are
several; or, where the .json names its media under "image", "images", "video" or "videos", each
where it is named.
"""

import hashlib
import json
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from torchtune_qwen25vl.media._images import SUFFIXES
from torchtune_qwen25vl.media._stored import StoredFile

TEXTS = (".json", ".txt", ".cls")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
COLUMNS = ("image", "images", "video", "videos")
KEY = "__key__"  # of a row: what the names of its members begin with
Member = tuple[str, int, Callable[[], bytes]]  # its name, its size, and what reads it


class TarRows:
    """The rows of tar files, of which 8 bytes are held: where the first member of each begins.

    Args:
        files: the files
        starts: where the rows of each begin
    """

    def __init__(self, files: Sequence[StoredFile], starts: Sequence[array]) -> None:
        self._files, self._starts = files, starts
        self._firsts = [*accumulate(map(len, starts), initial=0)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a row, its images and videos as bytes.

        Raises:
            ValueError: if its text is damaged, a member is of no known kind, or a medium that it
                names is not there.
        """
        return self._row(index, with_media=True)

    def column(self, name: str) -> list[Any]:
        with_media = name in COLUMNS
        return [self._value(index, name, with_media) for index in range(len(self))]

    def digest(self, index: int) -> str:
        """Return a short name of the texts of a row, and of names and sizes of its media."""
        digest = hashlib.sha256()
        for name, size, read in self._members(index):
            digest.update(f"{name} {size} ".encode("utf-8", "surrogateescape"))
            digest.update(read() if _suffix(name) in TEXTS else b"")
        return digest.hexdigest()[:16]

    def _row(self, index: int, *, with_media: bool) -> dict[str, Any]:
        row: dict[str, Any] = {}
        media: dict[str, dict[str, Any]] = {}
        for name, _, read in self._members(index):
            row.setdefault(KEY, _key(name))
            suffix = _suffix(name)
            if suffix == ".json":
                row |= _object(name, read())
            elif suffix in TEXTS:
                row[suffix[1:]] = _text(name, read())
            elif suffix not in SUFFIXES and suffix not in VIDEOS:
                raise ValueError(
                    f"{name}: members of a row are texts ({' '.join(TEXTS)}), images and videos; "
                    "leave others out of the tar"
                )
            elif with_media:
                media[name] = {"bytes": read(), "path": name}
        return _with_media(row, media) if with_media else row

    def _value(self, index: int, name: str, with_media: bool) -> Any:
        try:
            return self._row(index, with_media=with_media).get(name)
        except ValueError:
            return None

    def _members(self, index: int) -> Iterator[Member]:
        tar = bisect_right(self._firsts, index) - 1
        with self._files[tar].open() as file:
            file.seek(self._starts[tar][index - self._firsts[tar]])
            yield from _first_row(file)


def tars_in(folder: Path) -> list[Path]:
    """Return the tar files of a folder by name, none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar")


def open_tars(paths: Sequence[Path]) -> TarRows:
    """Find where the rows of tar files begin, without reading what they hold.

    Raises:
        ValueError: naming the file, if it is no tar, is cut short, or has the members of a row
            apart from each other.
    """
    starts = []
    for path in paths:
        try:
            starts.append(_starts(path))
        except (tarfile.TarError, OSError) as error:
            raise ValueError(
                f"{path}: cannot be read as a tar ({error}); unpack it if it is compressed"
            ) from error
    return TarRows([StoredFile.found(path) for path in paths], starts)


def _starts(path: Path) -> array:
    starts, seen, before = array("q"), set(), None
    with tarfile.open(path, "r:") as tar:
        for member in _files_of(tar):
            if (key := _key(member.name)) == before:
                continue
            if key in seen:
                raise ValueError(
                    f"{path}: the members of a row lie side by side, but those of {key} do not; "
                    "sort them by name"
                )
            starts.append(member.offset)
            seen.add(key)
            before = key
    return starts


def _first_row(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of the row that begins here."""
    key = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in _files_of(tar):
            if key not in (None, _key(member.name)):
                return
            key = _key(member.name)
            content: Any = tar.extractfile(member)
            yield member.name, member.size, content.read


def _files_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members that are files, but for hidden ones, which macOS adds."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # else all of them are kept
        if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
            yield member


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _key(name: str) -> str:
    """Return what the names of a row's members begin with: all before the first dot of the file."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name}: the row is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: the row is a JSON object, got {type(value).__name__}")
    return value


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: the text is not UTF-8 ({error})") from error


def _with_media(row: dict[str, Any], media: Mapping[str, Any]) -> dict[str, Any]:
    """Put media where the row names them, or under "image" and "video" where it names none."""
    named = {column: row[column] for column in COLUMNS if row.get(column)}
    if named:
        by_name = {**{PurePosixPath(name).name: one for name, one in media.items()}, **media}
        return row | {column: _found(value, by_name) for column, value in named.items()}
    columns: dict[str, list[Any]] = {"image": [], "video": []}
    for name, medium in media.items():
        is_video = _suffix(name) in VIDEOS
        columns["video" if is_video else "image"].append(medium)
    filled = {column: found for column, found in columns.items() if found}
    return row | {column: f if len(f) > 1 else f[0] for column, f in filled.items()}


def _found(value: Any, media: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_found(one, media) for one in value]
    if value not in media:
        raise ValueError(
            f"the row names {value!r}, but its media are {sorted(media)}; name them so, or leave "
            "the key out"
        )
    return media[value]
