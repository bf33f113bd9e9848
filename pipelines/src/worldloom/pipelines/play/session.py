"""One person in one world: start, step, go back, branch; no network, no threads.

    starts, a seed          -> reset   -> Shown: the prompt's last frame
    slots_rA                -> step    -> Shown: the r frames they lead to, and their codes
    a position              -> rewind  -> Shown: what was there; what is done next is a branch

Rewinding is exact: from a state in `history` what was done is done again, under the settings of
then, so that the same actions lead to the same codes. Everything goes into the log, if there is
one, so that `worldloom replay` can do it again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from worldloom.common import ActionSpec, ConfigError, FormatError, Frames, SlotArray
from worldloom.dynamics import NULL, SamplingConfig, fit_sampling

from ..action_sources import action_words
from ..world import World, WorldSnapshot
from .history import History
from .session_log import SessionLog
from .start_points import StartPoint, picture_start

if TYPE_CHECKING:
    from .companion import Companion

_MOST_SEED = 1 << 63


@dataclass(frozen=True, slots=True)
class Shown:
    """What a step shows."""

    frames_THWC: Frames
    """The r frames that it led to; after a reset the prompt's last one."""
    companion_THWC: Frames | None
    """The same of the real game or of the held-out truth, if one runs beside and goes on."""
    position: int
    """Latent frames since the start."""
    length: int
    """The farthest position to which `rewind` goes: more than `position` after going back."""
    action: str
    """In words; empty after a reset."""
    codes_hw: npt.NDArray[Any]
    """int64; (h, w, Q) where cells have levels."""
    model_ms: float
    """What the world took, decoding included."""
    forwards: int
    """Of the model; 0 after a reset."""
    context_frames: int
    """Latent frames that the next step sees."""


@dataclass(frozen=True, slots=True)
class _State:
    """All that brings a position back."""

    world: WorldSnapshot
    sampling: SamplingConfig
    shown: Shown


class PlaySession:
    """A world in somebody's hands. One caller at a time."""

    def __init__(  # noqa: PLR0913 - what a session is made of; no two belong together
        self,
        world: World,
        starts: Sequence[StartPoint],
        /,
        *,
        sampling: SamplingConfig,
        seed: int,
        log: SessionLog | None,
        memory_bytes: int = 256 << 20,
    ) -> None:
        """Hold a world; `reset` begins.

        Args:
            world: is nobody else's while this session plays it.
            starts: where it may begin.
            sampling: how codes are drawn at first.
            seed: of the first start, and of all until another is given.
            log: gets everything that is done.
            memory_bytes: for states to go back to; more make going back faster, never truer.
        """
        self._world = world
        self._starts = tuple(starts)
        self._sampling = sampling
        self._seed = _checked_seed(seed)
        self._log = log
        self._memory_bytes = memory_bytes
        self._point: StartPoint | None = None
        self._history: History[_State] | None = None
        self._shown: Shown | None = None
        self._companion: Companion | None = None
        self._adrift = False
        """Whether a step failed half-way, so that the world is not where history says."""

    @property
    def world(self) -> World:
        """The world that is played."""
        return self._world

    @property
    def starts(self) -> tuple[StartPoint, ...]:
        """Where it may begin."""
        return self._starts

    @property
    def point(self) -> StartPoint | None:
        """Where it began; None before the first reset."""
        return self._point

    @property
    def seed(self) -> int:
        """Of the last start."""
        return self._seed

    @property
    def position(self) -> int:
        """Latent frames since the start."""
        return self._begun().position

    @property
    def length(self) -> int:
        """The farthest position to which `rewind` goes."""
        return self._begun().length

    @property
    def shown(self) -> Shown:
        """What was shown last."""
        self._begun()
        assert self._shown is not None
        return self._shown

    @property
    def compared(self) -> bool:
        """Whether something runs beside."""
        return self._companion is not None

    @property
    def can_act(self) -> bool:
        """Whether the model can choose actions by itself."""
        return self._world.model.action_head is not None

    @property
    def sampling(self) -> SamplingConfig:
        """How the next codes are drawn; `rewind` brings back what was in force there.

        Raises:
            ConfigError: on setting it, if it is not for this model; nothing changed.
        """
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig, /) -> None:
        # The world gets it with the next step, so that what is tried in between leaves no trace: a
        # decoder, for one, begins anew whenever it is changed.
        fit_sampling(sampling, self._world.model)
        self._sampling = sampling

    def reset(
        self, *, start: int | None = None, picture: bytes | None = None, seed: int | None = None
    ) -> Shown:
        """Begin; where nothing else is said, from the same start and with the same seed as before.

        Args:
            start: which of the starts.
            picture: the bytes of a picture to start from.
            seed: of all that is drawn from now on.

        Raises:
            ConfigError: if there is no such start, no start at all, or a seed out of range.
            FormatError, MismatchError: if the picture cannot be read or does not fit.
        """
        if start is not None and picture is not None:
            raise ConfigError("reset: a start and a picture were given; begin from one of them")
        seed = self._seed if seed is None else _checked_seed(seed)
        if picture is not None:
            return self.begin(picture_start(picture, self._world), seed=seed)
        if start is None and self._point is not None:
            return self.begin(self._point, seed=seed)
        if not 0 <= (start or 0) < len(self._starts):
            raise ConfigError(
                f"reset: there is no start {start or 0}; there are {len(self._starts)}, counted "
                "from 0, and any picture is one, too"
            )
        return self.begin(self._starts[start or 0], seed=seed)

    def begin(self, point: StartPoint, /, *, seed: int) -> Shown:
        """Begin from a start that need not be one of `starts`; see `reset`."""
        with self._beside(lambda companion: companion.reset(point)[-1:]) as companion_THWC:
            shown = self._start(point, seed)
        return self._show(shown, companion_THWC)

    def step(self, slots_rA: SlotArray, /) -> Shown:
        """Do these r actions; return the r frames they lead to.

        After a rewind this branches, unless it does again what was done there.

        Raises:
            FormatError: if an action is not one of the model's; nothing happened.
        """
        history = self._begun()
        slots_rA = self._checked(slots_rA)
        if self._adrift:
            sampling = self._sampling
            self.rewind(history.position)
            self._sampling = sampling
        with self._beside(lambda companion: companion.step(slots_rA)) as companion_THWC:
            sampling = self._sampling
            shown = self._advance(slots_rA, sampling)
            history.add(slots_rA, sampling)
            shown = replace(shown, position=history.position, length=history.length)
            self._keep(shown, history)
            if self._log is not None:
                self._log.step(slots_rA=slots_rA, codes_hw=shown.codes_hw, sampling=sampling)
        self._sampling = history.sampling_at(history.position) or sampling
        return self._show(shown, companion_THWC)

    def act(self, *, temperature: float = 1.0) -> SlotArray:
        """Return slots_rA that the model itself would choose next; `step` does them.

        Raises:
            ConfigError: if it has no action head, or the temperature is below 0.
        """
        self._begun()
        return self._world.act(temperature=temperature)

    def rewind(self, position: int, /) -> Shown:
        """Go back (or, up to `length`, forth) to a position, and to the settings in force there.

        Raises:
            ConfigError: if there is no such position; nothing happened.
        """
        history = self._begun()
        if not 0 <= position <= history.length:
            raise ConfigError(
                f"rewind: there is no position {position}; there are 0 to {history.length}"
            )
        with self._beside(lambda companion: self._follow(companion, position)) as companion_THWC:
            shown = self._go_to(position, history)
        return self._show(shown, companion_THWC)

    def compare(self, companion: "Companion | None", /) -> None:
        """Let the real game, or the held-out truth, run beside; None ends it.

        It begins where the session began, and is brought to where it is.

        Raises:
            WorldloomError: if it cannot; then nothing runs beside.
        """
        if self._companion is not None:
            self._companion.close()
        self._companion = companion
        if self._history is not None:
            position = self._history.position
            with self._beside(lambda beside: self._follow(beside, position)) as companion_THWC:
                self._show(self.shown, companion_THWC)

    def close(self) -> None:
        """End what runs beside, and the log."""
        self.compare(None)
        if self._log is not None:
            self._log.close()

    @property
    def _actions(self) -> ActionSpec:
        return self._world.model.spec.actions

    def _begun(self) -> History[_State]:
        """Return the history since the start."""
        if self._history is None:
            raise ValueError("a session has no position before its first reset")
        return self._history

    def _start(self, point: StartPoint, seed: int) -> Shown:
        """Put the world at a start; if that fails, we are where we were."""
        began = time.perf_counter()
        self._world.sampling = self._sampling
        self._adrift = True
        frames_THWC = self._world.reset(point.start.codes_thw, point.start.slots_TA, seed=seed)
        shape = (self._world.steps_per_latent, self._actions.num_slots)
        history = History[_State](slots_shape=shape, budget_bytes=self._memory_bytes)
        codes_hw = point.start.codes_thw[-1].numpy()
        shown = self._look(frames_THWC[-1:], codes_hw, action="", began=began)
        self._keep(shown, history)
        if self._log is not None:
            self._log.reset(
                start=point.label,
                seed=seed,
                sampling=self._sampling,
                codes_thw=point.start.codes_thw.numpy(),
                slots_TA=point.start.slots_TA,
            )
        self._point, self._seed, self._history, self._adrift = point, seed, history, False
        return shown

    def _go_to(self, position: int, history: History[_State]) -> Shown:
        """Bring the world to a position of its history."""
        found, state = history.nearest(position)
        shown = self.shown
        # Else it is nearest to where we are.
        if self._adrift or not found <= history.position <= position:
            self._world.sampling = state.sampling
            self._world.restore(state.world)
            self._adrift = False
            history.move(found)
            shown = state.shown
        began = time.perf_counter()
        for slots_rA, sampling in history.steps(history.position, position):
            shown = self._advance(slots_rA, sampling)
            history.move(history.position + 1)
            shown = replace(shown, position=history.position)
            self._keep(shown, history)
        self._sampling = history.sampling_at(position) or self._sampling
        if self._log is not None:
            self._log.rewind(position)
        took_ms = 1000 * (time.perf_counter() - began)
        return replace(shown, length=history.length, model_ms=took_ms)

    def _advance(self, slots_rA: SlotArray, sampling: SamplingConfig) -> Shown:
        """Let the world do a step; its position is the caller's to fill in."""
        began = time.perf_counter()
        if sampling != self._world.sampling:
            self._world.sampling = sampling
        self._adrift = True
        frames_THWC, codes_hw = self._world.step(slots_rA)
        self._adrift = False
        # Each once: where a latent frame covers several steps, mostly one action is held.
        action = ", ".join(dict.fromkeys(action_words(self._actions, slots_rA)))
        return self._look(frames_THWC, codes_hw.numpy(), action=action, began=began)

    def _look(
        self, frames_THWC: Frames, codes_hw: npt.NDArray[Any], *, action: str, began: float
    ) -> Shown:
        """Return what there is to see now."""
        return Shown(
            frames_THWC=frames_THWC,
            companion_THWC=None,
            position=0,
            length=0,
            action=action,
            codes_hw=codes_hw,
            model_ms=1000 * (time.perf_counter() - began),
            forwards=self._world.forwards,
            context_frames=self._world.visible_frames,
        )

    def _keep(self, shown: Shown, history: History[_State]) -> None:
        """Keep a state of this position, where one is due."""
        if history.wants_state():
            state = _State(self._world.snapshot(), self._world.sampling, shown)
            size_bytes = state.world.size_bytes + shown.frames_THWC.nbytes + shown.codes_hw.nbytes
            history.keep(state, size_bytes=size_bytes)

    def _show(self, shown: Shown, companion_THWC: Frames | None) -> Shown:
        """Remember what is shown, and return it."""
        self._shown = replace(shown, companion_THWC=companion_THWC)
        return self._shown

    @contextmanager
    def _beside(self, move: Callable[["Companion"], Frames | None]) -> Iterator[Frames | None]:
        """Move what runs beside, then the world; if either fails, what runs beside is let go."""
        try:
            yield None if self._companion is None else move(self._companion)
        except BaseException:
            if self._companion is not None:
                self._companion.close()
                self._companion = None
            raise

    def _follow(self, companion: "Companion", position: int) -> Frames | None:
        """Bring a companion from the start to a position."""
        assert self._point is not None
        frames_THWC: Frames | None = companion.reset(self._point)[-1:]
        for slots_rA, _ in self._begun().steps(0, position):
            frames_THWC = companion.step(slots_rA)
        return frames_THWC

    def _checked(self, slots_rA: SlotArray) -> SlotArray:
        """Return slots, int64, each step of which is an action of the model, or NULL."""
        spec, shape = self._actions, (self._world.steps_per_latent, self._actions.num_slots)
        slots_rA = np.asarray(slots_rA)
        if slots_rA.shape != shape:
            raise FormatError(f"actions: shape {slots_rA.shape}, expected (r, A) = {shape}")
        given_r = (slots_rA != NULL).all(axis=1)
        slots_rA = slots_rA.copy()
        slots_rA[given_r] = spec.check_slots(slots_rA[given_r])
        if (slots_rA[~given_r] != NULL).any():
            raise FormatError(
                f"actions: {slots_rA.tolist()} gives a part of an action; {NULL}, for no action "
                "given, must stand in every slot of a step or in none"
            )
        return slots_rA.astype(np.int64)


def _checked_seed(seed: int) -> int:
    """Return a seed that the world can take."""
    if not 0 <= seed < _MOST_SEED:
        raise ConfigError(f"seed: {seed}, must be at least 0 and below 2**63")
    return seed
