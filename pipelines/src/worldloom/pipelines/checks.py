"""What a command refuses before it reads: numbers too low, folders not its own, no files."""

from pathlib import Path

from worldloom.common import ConfigError, FormatError


def require_at_least(low: int, settings: object, /, *names: str) -> None:
    """Refuse settings below a bound.

    Raises:
        ConfigError: naming the flag.
    """
    for name in names:
        value = getattr(settings, name)
        if value < low:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be at least {low}, got {value}")


def require_own_output(output: Path, /, *, sign: str, command: str) -> None:
    """Refuse to replace a folder that holds anything but an earlier result of the command.

    Args:
        output: the folder to write.
        sign: the file by which an earlier result is known.
        command: what writes such folders.

    Raises:
        ConfigError: if it holds something else, or is a file.
    """
    ours = (output / sign).is_file()
    if output.exists() and not ours and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output}: exists and was not written by {command}; choose another --output"
        )


def require_file(path: Path, /, *, expected: str) -> None:
    """Refuse what is no ordinary file that may be read: who reads a pipe waits for ever.

    Raises:
        FormatError: naming it.
    """
    try:
        if path.is_file():
            with path.open("rb"):
                return
        what = "not an ordinary file" if path.exists() else "not found"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    raise FormatError(f"{path}: {what}; expected {expected}")
