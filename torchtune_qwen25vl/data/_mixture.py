"""Several data sets as one, of each so many rows in a pass.

A weight says how often each row of a part is seen in a pass: 2 shows it twice, 0.5 in every other
pass. A count says how many rows a pass has of the part. Whoever walks through many passes takes the
rows of a part one after the other, so that none is seen again before all were seen; `training` does
so. As a plain data set a mixture is its first pass, which torchtune's own recipes repeat.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from omegaconf import OmegaConf
from torch.utils.data import Dataset
from torchtune import config
from torchtune.config._errors import InstantiationError

from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data._preference import PreferenceDataset
from torchtune_qwen25vl.media import JoinedRows
from torchtune_qwen25vl.transform import Qwen25VLTransform

AMOUNT = ("weight", "count")


@dataclass(frozen=True)
class Amount:
    """How much of a part a pass has.

    Attributes:
        source: name of the part's rows
        weight: how often each row is seen in a pass
        count: rows of a pass, in place of a weight
    """

    source: str
    weight: float = 1.0
    count: int | None = None

    def of_pass(self, rows: int) -> int:
        """Return how many rows a pass has of a part of so many."""
        return round(self.weight * rows) if self.count is None else self.count


class JoinedDataset(Dataset):
    """The samples of several data sets, one set after the other.

    Args:
        parts: the data sets
    """

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self.parts = parts
        self.rows = JoinedRows([part.rows for part in parts])
        self.source = " and ".join(part.source for part in parts)
        firsts = accumulate((len(part.rows) for part in parts), initial=0)
        self.bad_rows = tuple(
            first + row for first, part in zip(firsts, parts, strict=False) for row in part.bad_rows
        )
        self._firsts = [*accumulate(map(len, parts), initial=0)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at an index; errors are those of its own part."""
        part, own = self._at(index)
        return part[own]

    def prompt(self, index: int) -> dict[str, Any]:
        """Return what is asked in a row, see `SampleDataset.prompt`."""
        part, own = self._at(index)
        return part.prompt(own)

    def _at(self, index: int) -> tuple[SampleDataset, int]:
        part = bisect_right(self._firsts, index) - 1
        return self.parts[part], index - self._firsts[part]


class Mixture(Dataset):
    """The first pass of a mixture: of each part so many of its first rows, repeated as needed.

    Attributes:
        joined: all rows of all parts, each once
        amounts: how much of each part a pass has

    Args:
        parts: the data sets
        amounts: how much of each
    """

    def __init__(self, parts: Sequence[SampleDataset], amounts: Sequence[Amount]) -> None:
        self.joined = JoinedDataset(parts)
        self.amounts = tuple(amounts)
        counts = [own.of_pass(len(part)) for own, part in zip(amounts, parts, strict=True)]
        self._firsts = [*accumulate(counts, initial=0)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at an index of the first pass."""
        k = bisect_right(self._firsts, index) - 1
        part = self.joined.parts[k]
        return part[(index - self._firsts[k]) % len(part)]


def mixture(
    model_transform: Qwen25VLTransform,
    *,
    datasets: Sequence[Mapping[str, Any]],
    skip_bad_rows: str | None = None,
) -> Mixture:
    """Build a mixture of data sets that are built as each would be alone.

    Args:
        model_transform: tokenizer of the recipe
        datasets: sections of data sets, each with `_component_` and its arguments, and where it is
            not seen once in a pass, `weight` or `count`
        skip_bad_rows: report of the check command for all parts that do not name their own

    Raises:
        ValueError: if there are no parts, a part is none of this package's, is a mixture itself or
            has no rows, an amount cannot be, or rows of preference meet others.
    """
    if not isinstance(datasets, Sequence) or isinstance(datasets, str) or not datasets:
        raise ValueError(
            f"datasets is a list of sections, each with _component_, got {datasets!r:.80}"
        )
    parts, amounts = [], []
    for number, section in enumerate(datasets):
        name = f"datasets[{number}]"
        if not isinstance(section, Mapping):
            raise ValueError(f"{name} is a section with _component_, got {section!r:.80}")
        given = {**({"skip_bad_rows": skip_bad_rows} if skip_bad_rows else {}), **section}
        given_amount = {key: given.pop(key) for key in AMOUNT if key in given}
        part = _built(name, given, model_transform)
        parts.append(part)
        amounts.append(_amount(name, part, given_amount))
    kinds = {isinstance(part, PreferenceDataset): part.source for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"rows of preference and others are trained on by different recipes, but {kinds[True]} "
            f"has the former and {kinds[False]} the latter; mix one kind"
        )
    return Mixture(parts, amounts)


def parts_in(section: Mapping[str, Any]) -> list[Any]:
    """Return the sections of the parts in that of a mixture; none where it is another data set."""
    listed = section.get("datasets")
    parts = listed if isinstance(listed, Sequence) else ()
    return [part for part in parts if isinstance(part, Mapping)]


def _built(name: str, section: dict[str, Any], transform: Qwen25VLTransform) -> SampleDataset:
    try:
        part = config.instantiate(OmegaConf.create(section), transform)
    except (InstantiationError, TypeError) as error:
        raise ValueError(f"{name} cannot be built: {error}; mend its keys") from error
    if isinstance(part, Mixture):
        raise ValueError(f"{name} is a mixture itself; list its parts in its place")
    if not isinstance(part, SampleDataset):
        raise ValueError(
            f"{name} is built by {section.get('_component_')}, but a mixture takes the builders of "
            "torchtune_qwen25vl.data"
        )
    return part


def _amount(name: str, part: SampleDataset, given: Mapping[str, Any]) -> Amount:
    """Check how much a pass has of a part.

    Raises:
        ValueError: if it has no rows, or that is no amount.
    """
    if not len(part):
        raise ValueError(f"{name}, {part.source}, has no rows to train on; leave it out")
    if len(given) > 1:
        raise ValueError(f"{name} has a weight and a count; give one of them")
    weight, count = given.get("weight", 1), given.get("count")
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise ValueError(f"{name}: a weight is a number above 0, got {weight!r}")
    if "count" in given and (type(count) is not int or count < 1):
        raise ValueError(f"{name}: a count is a whole number from 1, got {count!r}")
    amount = Amount(part.source, float(weight), count)
    if not amount.of_pass(len(part)):
        raise ValueError(
            f"{name}: with weight {weight} a pass has none of the {len(part)} rows of "
            f"{part.source}; raise it, or leave the part out"
        )
    return amount
