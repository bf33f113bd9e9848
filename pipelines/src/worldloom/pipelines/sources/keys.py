"""Names of files, whatever they hold -> keys of episodes, safe and different from one another.

    ["run_1", "day 2/run 1"]  ->  unique_keys  ->  ["run_1", "day_2-run_1-7d1f0c55"]

A name that is a key already stays as it is. Every other one becomes one and carries a piece of its
SHA-256, so that a key depends on its own name alone, and files that come later change no other key.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

# 80 are allowed (docs/formats.md); `worldloom ingest --max-frames` adds "-000000".
MAX_SOURCE_KEY = 72
_HASH_CHARACTERS = 8
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def unique_keys(names: Sequence[str], /) -> list[str]:
    """Return a key of at most 72 characters for each of some different names, in their order."""
    keys = [_key(name) for name in names]
    # A stranger may have named a file as another one's key.
    seen = Counter(keys)
    return [
        key if seen[key] == 1 else _with_hash(key, name)
        for key, name in zip(keys, names, strict=True)
    ]


def _key(name: str) -> str:
    safe = _UNSAFE.sub("_", name.replace("/", "-"))
    same = safe == name and len(safe) <= MAX_SOURCE_KEY and not safe.startswith("tmp-")
    return name if same and name else _with_hash(safe, name)


def _with_hash(key: str, name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    room = MAX_SOURCE_KEY - _HASH_CHARACTERS - 1
    return f"{key.removeprefix('tmp-')[:room]}-{digest[:_HASH_CHARACTERS]}"
