"""Where theirs has no answer to a case: it raised, or has no such thing."""

from collections.abc import Callable
from typing import Any


class NotThereError(Exception):
    """This version of transformers has nothing that could be asked."""


class RefusalError(Exception):
    """Theirs raised where ours has an answer: the message is its exception, a colon and why."""


def ask(theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call theirs.

    Raises:
        RefusalError: if it raises, whatever it raises; only `parity.deviations` makes that right.
    """
    try:
        return theirs(*args, **kwargs)
    except Exception as error:
        raise RefusalError(f"{type(error).__name__}: {error}") from error
