"""Files that are written as a whole or not at all."""

import hashlib
import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all.

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
