"""Record the numbers that tests compare with: python tests/golden/record.py [NAME ...]

Every other module NAME.py of this folder has a function `record()`; what it returns becomes
NAME.json. A change of recorded numbers needs a line in CHANGELOG.md that says why.
"""

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # not this folder: its modules bear the names of packages
    names = sys.argv[1:] or sorted(p.stem for p in HERE.glob("*.py") if p.name != "record.py")
    for name in names:
        path = HERE / f"{name}.json"
        numbers = importlib.import_module(f"golden.{name}").record()
        path.write_text(json.dumps(numbers, indent=1) + "\n")
        sys.stderr.write(f"wrote {path}\n")
