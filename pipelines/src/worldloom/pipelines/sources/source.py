"""What every kind of source gives: recordings, frame by frame, and the actions that lead on.

    a folder of videos, a data set, arrays  ->  Source  ->  Recording, ...  ->  frames, actions

A source maps its own alignment to ours before anything leaves it: `actions[i]` is chosen on seeing
frame i and leads to frame i + 1. It never resizes and never drops a frame; `worldloom ingest` does,
the same way for all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from worldloom.common import ActionArray, ActionSpec, Frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One unbroken recording of a source; it becomes one episode."""

    key: str
    """Unique in the source, and safe as an episode's key (`check_key`)."""
    origin: str
    """Where it lies, for people: it is named in errors and in the episode's metadata."""


class OpenRecording(Protocol):
    """A recording that is being read; memory does not depend on its length."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """JSON values for the episode's metadata."""
        ...

    def frames(self) -> Iterator[Frames]:
        """Yield frame_HWC, uint8 RGB of the source's own size, in order; once.

        Each is an array of its own: whoever reads keeps many of them.

        Raises:
            FormatError: naming the file and the frame that cannot be read.
        """
        ...

    def actions(self, num_frames: int, /) -> ActionArray | None:
        """Return the num_frames - 1 actions between the frames, as `Source.combine` takes them.

        None where nobody knows them, in a source of which the person said that this may be.

        Raises:
            FormatError: if there are not as many as the source's rule wants, or one is out of
                range.
        """
        ...

    def rewards(self, num_frames: int, /) -> Any:
        """Return float32 [num_frames - 1], or None where the source has none."""
        ...


class Source(Protocol):
    """A data set of one kind, opened: what all its recordings share, and how each is read.

    It goes to the reading processes as it is, so it holds plain picklable values (no open file).
    """

    @property
    def actions(self) -> ActionSpec:
        """Of every recording."""
        ...

    @property
    def fps(self) -> float:
        """Frames per second of every recording; one of another rate is refused when opened."""
        ...

    @property
    def alignment(self) -> str:
        """One sentence: which action stands beside which frame there, and how that is mapped."""
        ...

    @property
    def combining(self) -> str:
        """What `combine` does, in words: "the mean of the steps"."""
        ...

    def combine(self, raw: ActionArray, frame_skip: int, /) -> ActionArray:
        """Return the raw actions, by `actions`, of the frames kept under a frame skip of 1 or more.

        Most sources call `combine_actions`.
        """
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """JSON values: provenance, for `EpisodesSpec.source`."""
        ...

    @property
    def recordings(self) -> Sequence[Recording]:
        """All of them, in an order that depends on the source alone."""
        ...

    def open(self, recording: Recording, /) -> AbstractContextManager[OpenRecording]:
        """Open one recording.

        Raises:
            FormatError: naming the file, if it is not what its name or index says.
        """
        ...
