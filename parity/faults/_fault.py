"""What a fault is, and the ways to seed one.

A fault hangs on names of the contract: functions and classes that the package offers, arguments and
outputs of modules, attributes of a built model. What lies inside may be renamed freely; a name of
the contract that is gone raises an error here, and the fault then counts as broken, not as caught.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn

from torchtune_qwen25vl import Qwen25VL

REPLACED_IN = ("torchtune_qwen25vl.", "parity.stages.")  # inputs and theirs stay right

Arguments = dict[str, Any]


def _leave(model: Qwen25VL) -> None:
    """Leave a model as it is."""


@dataclass(frozen=True)
class Fault:
    """A mistake somebody could make.

    Attributes:
        stage: the first stage that must see it
        seed: opens a context in which the package makes the mistake
        edit: puts the mistake into a built model; parameters may be replaced, not written to, as
            they share the memory of theirs
    """

    stage: str
    seed: Callable[[], AbstractContextManager] = nullcontext
    edit: Callable[[Qwen25VL], None] = _leave


def edited(edit: Callable[[Any], None], stage: str) -> Fault:
    """Seed a fault in a built model."""
    return Fault(stage, edit=edit)


def replaced(
    right: Callable, wrap: Callable[[Callable], Callable], stage: str, *, method: str | None = None
) -> Fault:
    """Seed a fault in a function, or a method of a class, that the package offers.

    Args:
        right: the function or class
        wrap: makes the wrong function or method from the right one
        stage: the first stage that must see it
        method: its name, where `right` is a class
    """
    if method is not None:
        wrong_method = wrap(getattr(right, method))
        return Fault(stage, seed=lambda: mock.patch.object(right, method, wrong_method))

    @contextmanager
    def seed() -> Iterator[None]:
        wrong = wrap(right)
        with contextlib.ExitStack() as stack:
            for module, name in _places(right):
                stack.enter_context(mock.patch.object(module, name, wrong))
            yield

    return Fault(stage, seed=seed)


def _places(function: Callable) -> list[tuple[Any, str]]:
    """Every module, and the name there, that a function of the package was imported to."""
    modules = [m for name, m in sys.modules.items() if f"{name}.".startswith(REPLACED_IN)]
    return [(m, name) for m in modules for name, value in vars(m).items() if value is function]


def change(owner: Any, **values: Any) -> None:
    """Set attributes that are there."""
    for name, value in values.items():
        getattr(owner, name)
        setattr(owner, name, value)


def on_entry(module: nn.Module, edit: Callable[[Arguments], Arguments]) -> None:
    """Change arguments of a module's forward: `edit` returns the new ones by name."""
    signature = inspect.signature(module.forward)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple, Arguments]:
        arguments = signature.bind(*args, **kwargs).arguments
        return (), {**arguments, **edit(arguments)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def on_exit(module: nn.Module, edit: Callable[[Arguments, Any], Any]) -> None:
    """Change the output of a module: `edit` gets the arguments of its forward and the output."""
    signature = inspect.signature(module.forward)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return edit(signature.bind(*args, **kwargs).arguments, output)

    module.register_forward_hook(hook, with_kwargs=True)


def exchange(module: nn.Module, first: str, second: str) -> None:
    """Exchange two submodules."""
    one, other = getattr(module, first), getattr(module, second)
    change(module, **{first: other, second: one})
