"""Items  ->  the same items, the next of which is made while one is used.

for piece in ahead(read()):     # the next piece is read in a thread
    compute(piece)
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def ahead(items: Generator[Item, None, None], /) -> Generator[Item, None, None]:
    """Yield the items of a generator, made in a thread, one at a time and one ahead.

    What it raises is raised here, in its turn. When this is closed, or left by an error, it waits
    for the item being made, so no thread outlives it, and closes the generator.
    """
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
            following = thread.submit(next, items, _END)
            while (item := following.result()) is not _END:
                following = thread.submit(next, items, _END)
                yield item  # type: ignore[misc]  # not _END, which mypy cannot know
    finally:
        items.close()
