"""Values made in a thread, ahead of whoever needs them."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Ahead(Generic[T]):
    """Go through an iterable in a thread, some values ahead.

    An exception of the iterable is raised where its value would have been.

    Args:
        values: are made in the thread
        depth: number of values that are kept ready

    Attributes:
        waited: seconds in which no value was ready when one was asked for
    """

    def __init__(self, values: Iterable[T], depth: int = 2) -> None:
        self.waited = 0.0
        self._values = values
        self._ready: queue.Queue[object] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while (value := self._next()) is not _END:
            if isinstance(value, BaseException):
                raise value
            yield value  # type: ignore[misc]

    def close(self) -> None:
        """End the thread; values that nobody asked for are dropped."""
        self._stopped.set()
        self._thread.join()

    def _next(self) -> object:
        start = time.perf_counter()
        value = self._ready.get()
        self.waited += time.perf_counter() - start
        return value

    def _fill(self) -> None:
        values = iter(self._values)
        try:
            for value in values:
                if not self._put(value):
                    break
            else:
                self._put(_END)
        except BaseException as error:
            self._put(error)
        finally:
            if hasattr(values, "close"):
                values.close()

    def _put(self, value: object) -> bool:
        """Wait for room; return whether there was any before `close`."""
        while not self._stopped.is_set():
            try:
                self._ready.put(value, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
