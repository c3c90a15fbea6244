"""Which rows of a mixture a pass has: of each part the next so many of a walk without end.

A walk goes through all rows of its part before it sees one again, each time in a new order, so that
a part of which a pass has half is seen whole in two. The rows of a pass follow from its number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchtune_qwen25vl.training._seeds import seed_of


class Portion(NamedTuple):
    """How much of a part of a mixture a pass has.

    Attributes:
        source: name of the part's rows
        places: number of its places, which stand side by side
        seen: how many of them a pass has
    """

    source: str
    places: int
    seen: int


def places_of_pass(
    portions: Sequence[Portion], epoch: int, *, shuffle: bool, seed: int
) -> torch.Tensor:
    """Return the places that a pass has, part after part.

    Args:
        portions: parts of the mixture
        epoch: number of the pass
        shuffle: whether a walk through a part is shuffled
        seed: seed of the shuffling
    """
    found, first = [], 0
    for number, portion in enumerate(portions):
        numbers = torch.arange(epoch * portion.seen, (epoch + 1) * portion.seen)
        rounds = numbers // portion.places
        own = numbers % portion.places
        if shuffle:
            own = torch.cat(
                [
                    _order(portion.places, seed, number, which)[own[rounds == which]]
                    for which in rounds.unique().tolist()
                ]
            )
        found.append(first + own)
        first += portion.places
    return torch.cat(found)


def _order(places: int, seed: int, part: int, which: int) -> torch.Tensor:
    """Return the order of a walk's round through a part."""
    generator = torch.Generator().manual_seed(seed_of(seed, part, which, 1))
    return torch.randperm(places, generator=generator)
