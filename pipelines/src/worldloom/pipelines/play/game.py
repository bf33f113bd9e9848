"""What a page asks for, done: messages -> a session's steps, resets, rewinds -> words and frames.

    Message, the input of that moment  ->  Game.do  ->  Outlet: state, frames, what was recorded

One caller at a time: the player's thread, which also decides when a step is due.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from worldloom.common import ConfigError, SlotArray, WorldloomError

from .controls import Controls
from .packing import ImageKind, PackedFrame, pack
from .protocol import (
    Autoplay,
    Compare,
    Format,
    Input,
    Message,
    Pace,
    Record,
    Reset,
    Rewind,
    Run,
    Settings,
    Step,
)
from .welcome import welcome_of

if TYPE_CHECKING:
    from .companion import Companion
    from .recording import Recording
    from .session import PlaySession, Shown


class Outlet(Protocol):
    """Where a game's words and frames go; called from the player's thread, and must not block."""

    def tell(self, message: Mapping[str, Any], /) -> None:
        """Take a message that must arrive."""

    def show(self, frames: Sequence[PackedFrame], /, *, afresh: bool) -> None:
        """Take the frames of a step; `afresh`: those before them are not worth sending any more."""


@dataclass(frozen=True, slots=True)
class Greet:
    """A page has come, and is told where things stand."""

    resumed: bool
    """It was here before, and goes on; else it finds everything as at the start."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The clock says that a step is due."""


Task = Message | Greet | Tick


class Game:
    """A session as a page commands it."""

    def __init__(
        self,
        session: "PlaySession",
        /,
        *,
        name: str,
        pace: float,
        companions: Mapping[str, Callable[[], "Companion"]],
        recordings: Path,
    ) -> None:
        """Hold a session that has not begun; see `Player`."""
        self._session = session
        self.controls = Controls.of(session.world.model.spec.actions)
        self._welcome = welcome_of(session, self.controls, name=name, companions=companions)
        self._companions = companions
        self._folder = recordings
        self._usual = (pace, session.sampling, session.seed)
        self.recorded: dict[str, Path] = {}
        """Finished recordings: the name by which they are asked for -> the file."""
        self.pictures: dict[str, bytes] = {}
        """What a page sent to start from, by the name that it was given."""
        self.outlet: Outlet | None = None
        """Who looks on; without one, words and frames go nowhere."""
        self.running = False
        self.due = 0.0
        """When the next step is, by time.monotonic, while it runs."""
        self._autoplay = False
        self._beside = "none"
        self._recording: Recording | None = None
        self._image: ImageKind = "jpeg"
        self._pace = pace
        self._start: int | str = 0
        self._picture: bytes | None = None
        self._shown: Shown | None = None
        self._held: tuple[str, ...] = ()
        self._input = Input((), 0)

    def do(self, task: Task, held: Input, /) -> None:
        """Do one thing, and tell how things stand then.

        Args:
            task: what to do.
            held: the newest input when it was asked for.

        Raises:
            WorldloomError: if it cannot be done; `complain` tells so.
        """
        self._input = held
        match task:
            case Tick():
                self._tick()
                return
            case Step():
                self._step()
                return
            case Greet():
                self._greet(task)
                return
            case Run():
                self.running, self.due = task.on, time.monotonic()
            case Reset():
                self._reset(task)
            case Settings():
                self._session.sampling = replace(self._session.sampling, **task.values)
            case Pace():
                self._pace, self.due = task.frames_per_s, time.monotonic()
            case Rewind():
                self._arrive(self._session.rewind(task.position))
            case Autoplay():
                self._let_play(on=task.on)
            case Compare():
                self._compare(task.beside)
            case Record():
                self._record(on=task.on)
            case Format():
                self._image = task.image
        self._tell_state()

    def complain(self, task: Task, sentence: str, /) -> None:
        """Tell what went wrong; a world that cannot step does not go on trying."""
        if isinstance(task, Tick | Step):
            self.running = False
        if self._beside != "none" and not self._session.compared:
            self._compare("none")  # the session let go of it
        self._tell({"type": "error", "message": sentence})
        self._tell_state()

    def end(self) -> None:
        """Complete what is being written, and close the session."""
        try:
            self._stop_recording()
        finally:
            self._session.close()

    def _tick(self) -> None:
        """Do the step that is due, and set when the next one is."""
        self._step()
        period = len(self._present().frames_THWC) / self._pace if self._pace else 0.0
        # A step that took longer than its time is not made up for by a rush.
        self.due = max(self.due + period, time.monotonic())

    def _step(self) -> None:
        """Generate one latent frame, and hand its pixel frames over."""
        session, began = self._session, time.monotonic()
        slots_rA = session.act() if self._autoplay else self._slots_rA()
        sampling = session.sampling
        shown = session.step(slots_rA)
        self._shown = shown
        held = self._input.held
        self._held = self.controls.held_of(slots_rA[-1]) if self._autoplay else held
        took_s = time.monotonic() - began
        spacing_s = 1 / self._pace if self._pace else took_s / len(shown.frames_THWC)
        self._show(spacing_s=spacing_s)
        if session.sampling != sampling:  # a stretch that was rewound is done again, as it was
            self._tell_state()
        if self._recording is not None:
            try:
                self._recording.add(shown.frames_THWC, slots_rA)
            except WorldloomError as error:  # as on a full disk: it ends, and play goes on
                self._tell({"type": "error", "message": f"the recording ends here: {error}"})
                self._stop_recording()
                self._tell_state()

    def _slots_rA(self) -> SlotArray:
        """Return the slots of what is held, for every pixel frame of a step."""
        slots_A = self.controls.slots_A(self._input.held)
        return np.repeat(slots_A[None], self._session.world.steps_per_latent, axis=0)

    def _greet(self, greet: Greet) -> None:
        """Tell a page all it needs."""
        if self._shown is None or not greet.resumed:
            outlet, self.outlet = self.outlet, None  # a page understands nothing before its welcome
            try:
                self._begin_anew()
            finally:
                self.outlet = outlet
        self._tell(
            {
                "type": "welcome",
                **self._welcome,
                "pace": self._pace,
                "settings": self._settings(),
                "resumed": greet.resumed,
            }
        )
        self._tell_state()
        self._show()

    def _begin_anew(self) -> None:
        """Set everything as it is when nobody has played yet."""
        self._pace, sampling, seed = self._usual
        self.running = self._autoplay = False
        self._image = "jpeg"
        self._compare("none")
        self._session.sampling = sampling
        self._reset(Reset(start=0, seed=seed))

    def _reset(self, reset: Reset) -> None:
        """Begin again, from a start of the gallery or from a picture."""
        start, picture = self._start, self._picture
        if reset.picture is not None:
            picture = self.pictures.get(reset.picture)
            if picture is None:
                raise ConfigError(
                    f"reset: there is no picture {reset.picture!r:.60} any more; send it again"
                )
            start = reset.picture
        elif reset.start is not None:
            start, picture = reset.start, None
        if isinstance(start, int):
            shown = self._session.reset(start=start, seed=reset.seed)
        else:
            self._compare("none")  # nobody knows what follows a picture
            shown = self._session.reset(picture=picture, seed=reset.seed)
        self._start, self._picture = start, picture
        self._arrive(shown)

    def _arrive(self, shown: "Shown") -> None:
        """Be somewhere else at once. A recording ends: its actions would not lead there."""
        self._stop_recording()
        self._shown, self._held = shown, ()
        self.due = time.monotonic()
        self._show()

    def _let_play(self, *, on: bool) -> None:
        """Let the model choose, or the person."""
        if on and not self._session.can_act:
            raise ConfigError("autoplay: this model has no action head, so it cannot play itself")
        self._autoplay = on

    def _compare(self, beside: str) -> None:
        """Show something beside the world, or nothing."""
        if beside == self._beside:
            return
        known = ["none", *self._companions]
        if beside not in known:
            raise ConfigError(
                f"compare: with is {beside!r:.60}, but for this world it can be {', '.join(known)}"
            )
        self._beside = "none"
        self._session.compare(None)
        if beside != "none":
            self._session.compare(self._companions[beside]())
            self._beside = beside
        self._shown = self._session.shown
        self._show()

    def _record(self, *, on: bool) -> None:
        """Begin a recording, or end it and hand it over."""
        from .recording import Recording

        if not on:
            self._stop_recording()
        elif self._recording is None:
            spec = self._session.world.model.spec
            self._recording = Recording(
                self._folder,
                f"recording-{token_hex(4)}",
                spec=spec.actions,
                fps=spec.fps or 0.0,
                first_HWC=self._present().frames_THWC[-1],
            )

    def _stop_recording(self) -> None:
        """End a recording, if one runs, and say where it is."""
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        try:
            recording.close()
        except WorldloomError as error:  # what was written before is there, and is handed over
            self._tell({"type": "error", "message": f"the recording is cut short: {error}"})
        files = {"mp4": recording.mp4, "json": recording.actions}
        self.recorded.update((path.name, path) for path in files.values())
        urls = {kind: f"/recording/{path.name}" for kind, path in files.items()}
        self._tell({"type": "recorded", **urls, "frames": recording.frames})

    def _show(self, *, spacing_s: float | None = None) -> None:
        """Hand frames over: all that a step led to, or without a spacing where we are now."""
        if self.outlet is None:
            return
        shown = self._present()
        if spacing_s is None:
            beside = shown.companion_THWC
            shown = replace(
                shown,
                frames_THWC=shown.frames_THWC[-1:],
                companion_THWC=None if beside is None else beside[-1:],
            )
        frames = pack(
            shown,
            answers={"n": self._input.n, "held": list(self._held)},
            image=self._image,
            now=time.monotonic(),
            spacing_s=spacing_s or 0.0,
        )
        self.outlet.show(frames, afresh=spacing_s is None)

    def _present(self) -> "Shown":
        """Return what is to be seen now."""
        assert self._shown is not None, "a page is greeted before anything else is done for it"
        return self._shown

    def _settings(self) -> dict[str, Any]:
        """Return how the next frames are drawn, with the decoder's real name."""
        sampling = self._session.sampling
        if sampling.decoder == "own":
            sampling = replace(sampling, decoder=self._welcome["decoders"][0])
        return asdict(sampling)

    def _tell_state(self) -> None:
        """Tell how things stand, once there is anywhere to stand."""
        if self._shown is None:
            return
        self._tell(
            {
                "type": "state",
                "running": self.running,
                "position": self._session.position,
                "length": self._session.length,
                "seed": self._session.seed,
                "start": self._start,
                "settings": self._settings(),
                "pace": self._pace,
                "autoplay": self._autoplay,
                "compare": self._beside,
                "recording": self._recording is not None,
            }
        )

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self.outlet is not None:
            self.outlet.tell(message)
