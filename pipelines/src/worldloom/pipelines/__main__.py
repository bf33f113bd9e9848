"""`python -m worldloom.pipelines COMMAND` -> the same as `worldloom COMMAND`."""

import sys

from .cli import main

# Spawned worker processes import this file again, under another name, and must not run it.
if __name__ == "__main__":
    sys.exit(main())
