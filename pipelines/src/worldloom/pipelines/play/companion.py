"""What runs beside a world, so that a person sees how far it is right.

    WorldFiles, World  -> open_companions -> by name, what can be opened here: "game", "truth"
    StartPoint         -> reset -> the frame where play begins
    slots_rA           -> step  -> the r frames that they lead to, or that truly followed

"game" is the real game, which does what the player does, from the same state as the world
(real_game.py). "truth" is what happened in the recording: it goes its own way, whatever is pressed,
and shows how well the world does under the true actions. Both are in step with the world: one call
a latent frame, frames of the size that the world shows.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from worldloom.common import Frames, SlotArray, WorldloomError, say

from .real_game import RealGame, recorded_game

if TYPE_CHECKING:
    from ..world import World
    from .start_points import StartPoint
    from .worlds import WorldFiles


class Companion(Protocol):
    """Something beside the world, moved along with it."""

    def reset(self, start: "StartPoint", /) -> Frames:
        """Go to where the world begins; return that frame, frames_1HWC.

        Raises:
            WorldloomError: if it cannot begin there; it may be closed then, and nothing else.
        """
        ...

    def step(self, slots_rA: SlotArray, /) -> Frames | None:
        """Return the next r frames_THWC; None once there are no more."""
        ...

    def close(self) -> None:
        """Let go of everything; further calls do nothing."""
        ...


def open_companions(files: "WorldFiles", world: "World", /) -> dict[str, Callable[[], Companion]]:
    """Return how to open what can run beside this world here, by name; nothing is opened yet."""
    companions: dict[str, Callable[[], Companion]] = {}
    if files.episodes is not None:
        try:
            game = recorded_game(files.episodes, world.model.spec.actions)
        except WorldloomError as error:
            say(f"the real game cannot run beside the world: {error}")
        else:
            if game is not None:
                companions["game"] = partial(RealGame, game, world)
    if files.starts is not None:
        companions["truth"] = partial(Truth, world)
    return companions


class Truth:
    """What truly followed a start, as it was recorded."""

    def __init__(self, world: "World", /) -> None:
        self._world = world
        self._frames_THWC: Frames | None = None
        self._start: StartPoint | None = None
        self._begin = 0
        self._next = 0

    def reset(self, start: "StartPoint", /) -> Frames:
        """Read a recorded moment; return the last frame of its prompt.

        Raises:
            ConfigError: if the start is a picture, which nothing followed.
        """
        if self._frames_THWC is None or start is not self._start:  # going back reads nothing
            truth = start.read_truth(self._world)
            codes = self._world.tokenizer.spec.codes
            self._frames_THWC, self._start = truth.true_frames_THWC, start
            self._begin = codes.pixel_frames(len(truth.codes_thw))
        assert self._frames_THWC is not None  # a recorded moment has its frames
        self._next = self._begin
        return self._frames_THWC[self._next - 1 : self._next]

    def step(self, slots_rA: SlotArray, /) -> Frames | None:
        """Return what followed, whatever is pressed; None where the recording ends."""
        frames_THWC, r = self._frames_THWC, len(slots_rA)
        if frames_THWC is None or self._next + r > len(frames_THWC):
            self._next = len(frames_THWC) if frames_THWC is not None else 0
            return None
        self._next += r
        return frames_THWC[self._next - r : self._next]

    def close(self) -> None:
        """Let go of the frames."""
        self._frames_THWC = None
