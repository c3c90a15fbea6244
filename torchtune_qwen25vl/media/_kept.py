"""Files of a cache, which appear whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path


def keep(path: Path, chunks: Iterable[bytes], *, hidden: str) -> None:
    """Write a file under a hidden name, and give it its own once it is on disk.

    Args:
        path: where the file is to be; its folder is made
        chunks: what it holds
        hidden: name beside it, which no process uses at the same time
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(hidden)
    try:
        with part.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
