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
        window: number of places that a stream shuffles among themselves; None for other rows
    """

    source: str
    places: int
    seen: int
    window: int | None = None


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
                    _shuffled(own[rounds == which], portion, (seed, number, which, 1))
                    for which in rounds.unique().tolist()
                ]
            )
        found.append(first + own)
        first += portion.places
    return torch.cat(found)


def keep_streams_in_order(order: torch.Tensor, portions: Sequence[Portion]) -> torch.Tensor:
    """Let the places of a stream follow each other as `places_of_pass` has them.

    Args:
        order: order of the places of a pass, which is changed
        portions: parts of the mixture
    """
    first = 0
    for portion in portions:
        end = first + portion.seen
        if portion.window is not None:
            order[(order >= first) & (order < end)] = torch.arange(first, end)
        first = end
    return order


def order_in_window(number: int, window: int, places: int, seeds: tuple[int, ...]) -> torch.Tensor:
    """Return the order of the places of a window, counted from its first.

    Args:
        number: number of the window
        window: number of places of a whole window
        places: number of places of all windows
        seeds: seeds of the round through the windows
    """
    size = min(window, places - number * window)
    generator = torch.Generator().manual_seed(seed_of(*seeds, number))
    return torch.randperm(size, generator=generator)


def _shuffled(numbers: torch.Tensor, portion: Portion, seeds: tuple[int, ...]) -> torch.Tensor:
    """Return the places at these numbers, which follow each other, of a walk's round."""
    if portion.window is None:
        generator = torch.Generator().manual_seed(seed_of(*seeds))
        return torch.randperm(portion.places, generator=generator)[numbers]
    window, first = portion.window, int(numbers[0]) // portion.window
    orders = [
        which * window + order_in_window(which, window, portion.places, seeds)
        for which in range(first, int(numbers[-1]) // window + 1)
    ]
    return torch.cat(orders)[numbers - first * window]
