"""The text file of an image, in UTF-8 without a byte order mark, written as a whole."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.jobs import Item

Existing = Literal["skip", "overwrite", "append", "prepend"]
EXISTING = ("skip", "overwrite", "append", "prepend")


@dataclass(frozen=True)
class TextFiles:
    """Where the text file of an image lies.

    Attributes:
        mirror: folder that repeats the folders of the images; None to write beside each image
        naming: "stem" for a.txt, "full" for a.jpg.txt
        suffix: of the text files
    """

    mirror: Path | None = None
    naming: Literal["stem", "full"] = "stem"
    suffix: str = ".txt"

    def path(self, item: Item) -> Path:
        """Return the path of an item's text file.

        Raises:
            ValueError: if the item is no file, and there is no mirror.
        """
        if item.path is None:
            if self.mirror is None:
                raise ValueError(
                    f"{item.name} lies inside a table, so no text file can lie beside it: set "
                    "mirror_dir, or write jsonl or csv"
                )
            table, _, row = item.name.rpartition("#")
            return self.mirror / Path(table).name / f"{row}{self.suffix}"
        path = item.path
        if self.mirror is not None:
            path = self.mirror / os.path.relpath(path, item.root).replace("../", "")
        stem = path.stem if self.naming == "stem" else path.name
        return path.with_name(f"{stem}{self.suffix}")


def read_text(path: Path) -> str:
    """Read the caption in a text file; it is empty where there is no file.

    Raises:
        ValueError: if it is not UTF-8.
        OSError: if it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption in {path} cannot be read: {error}") from error


def write_text(path: Path, caption: str) -> None:
    """Write a text file into a folder that is there.

    Raises:
        OSError: if it cannot be written, or its folder is gone.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    write_file(path, f"{caption}\n".encode())
