"""Front doors that open only the room asked for (PEP 562).

    {"module": ("Name", ...)} -> the `__getattr__` and `__dir__` of a package

`import worldloom.common` must not import torch, or `worldloom --help` would take seconds. A front
door therefore names its exports twice: under TYPE_CHECKING, for people and type checkers, and in
one table for this function; a test holds the two equal.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def lazy_exports(
    package: str, rooms: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return (`__getattr__`, `__dir__`) for `package`, whose submodules export `rooms`."""
    homes = {name: module for module, names in rooms.items() for name in names}

    def getattr_(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{homes[name]}", package), name)

    def dir_() -> list[str]:
        return sorted(homes)

    return getattr_, dir_
