"""A stranger's file of lines -> the lines, one at a time, each with its place for an error.

NAME.jsonl  ->  bounded_lines  ->  ("NAME.jsonl: line 1", b"{...}"), ...
"""

from collections.abc import Iterator
from pathlib import Path

from worldloom.common import FormatError

from ..checks import require_file


def bounded_lines(
    path: Path, /, *, expected: str, max_line_bytes: int
) -> Iterator[tuple[str, bytes]]:
    """Yield where each line stands, and its bytes: a file of one line must not fill the memory.

    Args:
        path: the file.
        expected: what it should hold, for the error.
        max_line_bytes: a longer line is refused.

    Raises:
        FormatError: if it is missing or no regular file; naming the line that is too long.
    """
    require_file(path, expected=expected)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(max_line_bytes + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > max_line_bytes:
                raise FormatError(f"{where}: more than {max_line_bytes} bytes in one line")
            yield where, line
