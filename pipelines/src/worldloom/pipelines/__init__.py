"""The command line and everything in which both halves meet.

After `import worldloom.pipelines`, `gymnasium.make("worldloom/World-v0", world="runs/demo")` knows
what is meant, whichever of the two was imported first.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _WhenGymnasiumComes(MetaPathFinder):
    """Registers our environments once Gymnasium is imported, if it ever is.

    Importing it for that would cost every `worldloom --help` a tenth of a second, and it knows no
    entry points by which packages could announce theirs.
    """

    _looking = False

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Find Gymnasium as everybody does, and register when it has run."""
        if fullname != "gymnasium" or self._looking:
            return None
        self._looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            # Not before: others may ask whether it is there without importing it.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            from . import registration as registration

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "gymnasium" in sys.modules:
    from . import registration as registration
else:
    sys.meta_path.insert(0, _WhenGymnasiumComes())
