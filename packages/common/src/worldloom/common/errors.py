"""Every exception we raise on purpose.

    WorldloomError
        ConfigError     a setting is missing, unknown or contradictory  (fix the flag or the TOML)
        ShapeError      a tensor does not have the shape its name says  (fix the caller)
        FormatError     a file is not what its header or index claims   (rebuild the file)
        MismatchError   two artifacts do not belong together            (pick another one)
        StorageError    the disk refused a read or a write              (make room, mend rights)
        TrainingError   training cannot go on: a loss is not finite     (turn down, check the data)

A bad argument of a function is a plain ValueError. `exit_code` is what the command line returns.
"""


class WorldloomError(Exception):
    """Anything we raise on purpose; its message is one sentence a person can act on."""

    exit_code = 1


class ConfigError(WorldloomError):
    """A setting is missing, unknown or contradictory."""

    exit_code = 2


class ShapeError(WorldloomError):
    """A tensor does not have the shape its name says."""


class FormatError(WorldloomError):
    """A file or folder is missing, or is not what its header or index claims."""

    exit_code = 3


class MismatchError(WorldloomError):
    """Two artifacts do not belong together."""

    exit_code = 3


class StorageError(WorldloomError):
    """The disk refused a read or a write."""


class TrainingError(WorldloomError):
    """Training cannot go on, for example because a loss is not finite."""
