"""Files as they were when their rows were counted: rows are read from them for as long as a run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self


@dataclass(frozen=True)
class StoredFile:
    """A file that is read at places found earlier, and may not change in between.

    Attributes:
        path: where it is
        size: bytes it had
        time: when it was last changed, in nanoseconds
    """

    path: Path
    size: int
    time: int

    @classmethod
    def found(cls, path: Path) -> Self:
        """Note the state of a file."""
        stat = path.stat()
        return cls(path.absolute(), stat.st_size, stat.st_mtime_ns)

    def open(self) -> BinaryIO:
        """Open it for reading.

        Raises:
            ValueError: if it is not as it was.
        """
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read any more ({error.strerror})") from error
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.time):
            file.close()
            raise ValueError(
                f"{self.path}: the file has changed since its rows were counted; start again"
            )
        return file
