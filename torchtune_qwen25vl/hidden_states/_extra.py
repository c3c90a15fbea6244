"""Libraries that only this room needs: the extra `states`."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Say which extra brings a library whose import fails.

    Args:
        what: needs it

    Raises:
        ValueError: if it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what} need {error.name}: install the extra, torchtune-qwen25vl[states]"
        ) from error
