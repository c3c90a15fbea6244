"""What a fault is, and three ways to seed one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn

EDITS: list[
    Callable[[Any], None]
] = []  # applied by parity.trace.ours_like to every model it builds


@dataclass(frozen=True)
class Fault:
    """A mistake somebody could make, and the first stage that must see it."""

    seed: Callable[[], AbstractContextManager]
    stage: str


def patched(owner: Any, name: str, wrap: Callable[[Callable], Callable], stage: str) -> Fault:
    """Replace a function or method of our package by `wrap(the right one)`."""
    return Fault(lambda: mock.patch.object(owner, name, wrap(getattr(owner, name))), stage)


def edited(edit: Callable[[Any], None], stage: str) -> Fault:
    """Change our model once it is loaded; parameters may be replaced, but not written to."""

    @contextmanager
    def seed() -> Iterator[None]:
        EDITS.append(edit)
        try:
            yield
        finally:
            EDITS.remove(edit)

    return Fault(seed, stage)


def swap(first: str, second: str, modules: Callable[[Any], list[nn.Module]]) -> Callable:
    """An edit that exchanges two submodules."""

    def edit(model: Any) -> None:
        for module in modules(model):
            one, other = getattr(module, first), getattr(module, second)
            setattr(module, first, other)
            setattr(module, second, one)

    return edit
