"""A file that one process holds, until it lets go or is dead."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

try:
    import fcntl
except ImportError:  # on Windows
    HAS_FCNTL = False
else:
    HAS_FCNTL = True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a file if no other process does; yield whether it is held."""
    with _by_system(path) if HAS_FCNTL else _by_name(path) as is_ours:
        yield is_ours


@contextlib.contextmanager
def _by_system(path: Path) -> Iterator[bool]:
    with path.open("w") as file:
        try:
            # lockf, not flock: processes started from here must not inherit it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _by_name(path: Path) -> Iterator[bool]:
    """Hold a file that names its holder; one whose holder is dead is free."""
    if _is_alive(path):
        yield False
        return
    path.unlink(missing_ok=True)
    try:
        with path.open("x") as file:  # of two at once, one makes it
            file.write(_name_of(psutil.Process()))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def _is_alive(path: Path) -> bool:
    try:
        name = path.read_text()
        return _name_of(psutil.Process(int(name.split()[0]))) == name
    except (OSError, IndexError, ValueError, psutil.Error):
        return False


def _name_of(process: psutil.Process) -> str:
    return f"{process.pid} {process.create_time()}"
