"""The command line: a command's name and its flags -> its result on stdout, an exit code.

    ["tokenize", "--episodes", "runs/demo/episodes", ...]  ->  main  ->  the manifest's path, 0

The only place that catches: our errors become one line and their exit code, Ctrl-C one line and
130, SIGTERM 143; anything else stays a traceback and 1. `worldloom --help` imports nothing heavy,
and `worldloom COMMAND --help` that command's module only.
"""

import difflib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from worldloom.common import ConfigError, WorldloomError

from .commands import COMMANDS, Command

_INTRODUCTION = """\
usage: worldloom COMMAND [flags]

Turn gameplay video into a world that can be played.
"""
_EXAMPLE = """\
example:
  worldloom demo --output runs/demo   the whole chain, here, in minutes
  worldloom COMMAND --help            every flag of a command, and its default

Each flag is also a key of a TOML file: --preset NAME for one that comes along,
--config FILE for yours. Results go to stdout, all else to stderr. Exit codes:
0 done, 1 failed, 2 wrong usage, 3 bad data, 130 or 143 stopped from outside.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _sigterm_exits():
            return _run(words)
    except WorldloomError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped by Ctrl-C; {_what_now(words)}\n")
        return 130


def help_text() -> str:
    """Return what `worldloom --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS.values()]
    return "\n".join([_INTRODUCTION, "commands, in the order of the data:", *lines, "", _EXAMPLE])


def _run(words: Sequence[str]) -> int:
    """Print a command's result, or the help, on stdout; return the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        _print(help_text())
        return 0 if words else 2
    if words[0] == "--version":
        _print(f"worldloom {version('worldloom')}\n")
        return 0
    command = _command(words[0])
    cls, function = command.load()
    from .settings import parse  # tyro takes a tenth of a second, which the help above need not pay

    with _reader_may_leave():
        config = parse(cls, words[1:], command=command.name)
    try:
        result = function(config)
    except SystemExit:  # of a training that was asked to stop, and has saved
        _leave_group()
        raise
    _leave_group()
    if result is not None:
        _print(f"{result}\n")
    # A result that is a judgement on this machine (doctor's) says itself how the command ends.
    return int(getattr(result, "exit_code", 0))


def _leave_group() -> None:
    """Part from the other processes of a training; unparted, one now and then aborts as it ends."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _print(text: str) -> None:
    with _reader_may_leave():
        sys.stdout.write(text)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Exit quietly if who reads our stdout leaves early, as in `| head`.

    Around what prints, never around a command's work: there a broken pipe is a failure.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _command(name: str) -> Command:
    """Return the command of that name, or name the nearest."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"{name!r} is no command; {meant}")
    return COMMANDS[name]


def _what_now(words: Sequence[str]) -> str:
    """Return what running a stopped command again would do."""
    if words and words[0] in COMMANDS and COMMANDS[words[0]].continues:
        return "run the same command again, and it continues where it stopped"
    return "nothing is half written; run the same command again to start over"


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that temporary files go, and end it with 143.

    Training installs a handler of its own, which saves first.
    """

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
