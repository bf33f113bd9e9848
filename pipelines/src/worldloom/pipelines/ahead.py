"""Items  ->  the same items, the next of which is made while one is used.

with closing(Ahead(read())) as pieces:      # the first piece is being read from here on
    for piece in pieces:                    # and the next one while this one is used
        compute(piece)
"""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
_END = object()


class Ahead(Iterator[Item], Generic[Item]):
    """The items of a generator, made in a thread, one at a time and one ahead.

    What it raises is raised here, in its turn. When this is closed, or ends, or is left by an
    error, it waits for the item being made, so no thread outlives it, and closes the generator.
    """

    def __init__(self, items: Generator[Item, None, None], /) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._following: Future[Any] | None = self._thread.submit(next, items, _END)

    def __next__(self) -> Item:
        if self._following is None:
            raise StopIteration
        try:
            item = self._following.result()
        except BaseException:
            self.close()
            raise
        if item is _END:
            self.close()
            raise StopIteration
        self._following = self._thread.submit(next, self._items, _END)
        return item  # type: ignore[no-any-return]  # not _END, which mypy cannot know

    def close(self) -> None:
        """Make no further items, and wait for the one being made."""
        self._following = None
        self._thread.shutdown()
        self._items.close()
