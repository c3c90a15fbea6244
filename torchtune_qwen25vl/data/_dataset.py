"""Rows -> samples: the map-style dataset that recipes index, with a policy for bad rows.

A bad row is an error that names it. Which rows to leave out instead is decided once, before
training, by the check command: its report is an argument of the dataset. So every process and every
resumed run sees the same rows under the same numbers, nothing is replaced by its neighbour, and a
row that turns bad later is an error again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchtune.datasets._sft import SFTTransform
from torchtune.utils import get_logger, log_rank_zero

from torchtune_qwen25vl.data._bad_rows import read_bad_rows
from torchtune_qwen25vl.data._conversation import Conversation
from torchtune_qwen25vl.data._options import OPTIONS, Options
from torchtune_qwen25vl.data._reader import Reader
from torchtune_qwen25vl.data._weights import OF_TURNS, with_weights
from torchtune_qwen25vl.media import Rows
from torchtune_qwen25vl.transform import Qwen25VLTransform, SkipSample


class SampleDataset(Dataset):
    """Samples of a set of rows; media are read when a sample is, in the dataloader's worker.

    Labels are made by the installed torchtune (0.6.1 shifts them in its recipes, later versions
    here).

    Args:
        rows: rows as stored
        read: reader, from a row to its messages
        model_transform: transform from messages to a sample
        source: name of the rows in error messages
        bad_rows: numbers of the rows to leave out
    """

    def __init__(
        self,
        rows: Rows,
        read: Reader,
        model_transform: Qwen25VLTransform,
        *,
        source: str,
        bad_rows: tuple[int, ...] = (),
    ) -> None:
        self.rows = rows
        self.source = source
        self.bad_rows = bad_rows
        self._read = read
        bad = np.unique(np.array(bad_rows, dtype=np.int64))
        self._good_before = bad - np.arange(len(bad))  # each bad row
        self._transform = model_transform
        self._label = SFTTransform(model_transform=model_transform)

    def __len__(self) -> int:
        return len(self.rows) - len(self._good_before)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at `index` among the rows that are not left out.

        Raises:
            ValueError: naming the row, counted from 0 in the source, if it is bad.
            SkipSample: if the transform would skip it; the check command lists such rows.
        """
        return self._named(index, lambda row: self._sample(self._read(row)))

    def row_of(self, index: int) -> int:
        """Return the number of the row at `index` among those that are not left out.

        Raises:
            IndexError: if there are fewer.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.source} has {len(self)} rows to train on, none at {index}")
        return index + int(np.searchsorted(self._good_before, index, side="right"))

    def prompt(self, index: int) -> dict[str, Any]:
        """Return what is asked in a row, up to where its last answer begins.

        Returns:
            What the transform makes of it for inference, "prompt", its texts; "reference", the last
            answer, None where the row ends with a question; and "row", the row's other columns

        Raises:
            ValueError, SkipSample: as for the sample.
        """
        return self._named(index, self._prompt)

    def _prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        read = self._read.prompt(row)
        if OF_TURNS in read:
            raise ValueError("answers are drawn, so those of a row have no weight; leave it out")
        texts = [message.text_content for message in read["messages"]]
        sample = self._transform(read, inference=True)
        return {**sample, "prompt": "\n".join(filter(None, texts)), "row": _plain(row)}

    def _named(
        self, index: int, make: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Make something of a row, and name the row if that cannot be."""
        row = self.row_of(index)
        try:
            return make(self.rows[row])
        except SkipSample as error:
            raise SkipSample(
                f"{self.source}, row {row}: {error}; run the check command and give the dataset "
                "its report as skip_bad_rows"
            ) from error
        except Exception as error:  # whatever a row makes fail, its name must not be lost
            reason = f"{error}" if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{self.source}, row {row}: {reason}") from error

    def _sample(self, read: dict[str, Any]) -> dict[str, Any]:
        weights = read.pop(OF_TURNS, None)
        sample = self._label(read)
        return with_weights(sample, weights) if weights else sample

    def answers(self, index: int) -> list[str]:
        """Return the texts of the answers of a row that can be read, as they are written there."""
        return self._read.answers(self.rows[self.row_of(index)])


def _plain(value: Any) -> Any:
    """Leave out what is no text, number, list or mapping of such: media are not handed on."""
    if isinstance(value, dict):
        pairs = ((key, _plain(one)) for key, one in value.items())
        return {key: one for key, one in pairs if one is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool)) else None


def sample_dataset(
    model_transform: Qwen25VLTransform,
    rows: Rows,
    parse: Callable[[dict[str, Any]], Conversation],
    *,
    source: str,
    split: str | None = None,
    kinds: tuple[type[Reader], type[SampleDataset]] = (Reader, SampleDataset),
    **options: Any,
) -> SampleDataset:
    """Make a dataset of rows by the parser of their format and the options common to all formats.

    Args:
        model_transform: tokenizer of the recipe
        rows: rows as stored
        parse: parser of the format
        source: where the rows lie, their name in error messages
        split: split that they are; a part of one stands in their name, by which parts are told
            apart, and its rows are counted from 0
        kinds: kinds of the reader and of the dataset
        **options: `Options`

    Raises:
        ValueError: if an option cannot be.
    """
    if unknown := sorted(options.keys() - OPTIONS):
        raise ValueError(
            f"{source}: {', '.join(unknown)} mean nothing for these rows; the options are "
            f"{', '.join(sorted(OPTIONS))}"
        )
    given = Options(**options)
    name = f"{source} {split}" if split and "[" in split else source
    bad_rows: tuple[int, ...] = ()
    if given.skip_bad_rows is not None:
        bad_rows = read_bad_rows(given.skip_bad_rows, name, rows)
        log_rank_zero(
            get_logger("INFO"),
            f"{name}: leaving out {len(bad_rows)} of {len(rows)} rows, {list(bad_rows[:20])} "
            f"{'and others ' * (len(bad_rows) > 20)}as {given.skip_bad_rows} lists them",
        )
    reader, dataset = kinds
    read = reader(
        parse,
        limits={"min_pixels": model_transform.min_pixels, "max_pixels": model_transform.max_pixels},
        sampling=model_transform.video_transform.sampling,
        may_shrink=model_transform.over_long == "shrink_images",
        root=_root(given.media_root, source),
        options=given,
    )
    return dataset(rows, read, model_transform, source=name, bad_rows=bad_rows)


def _root(media_root: str | None, source: str) -> Path | None:
    """Return where relative media paths start: as given, or where the rows lie."""
    if media_root is not None:
        return Path(media_root).expanduser().absolute()
    path = Path(source).absolute()
    if path.is_dir():
        return path
    return path.parent if path.is_file() else None
