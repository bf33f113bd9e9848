"""A play session again: the same codes, or the first frame that differs; and a video of it.

    SESSION, its model and tokenizer  ->  SESSION/replay.mp4, every frame in the order it was shown

Reads session.json and events.jsonl (docs/formats.md). The prompts are in there, so that neither
shards nor episodes are needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tyro.conf import Positional, arg
from worldloom.common import (
    ConfigError,
    FormatError,
    Frames,
    MismatchError,
    describe_difference,
    file_sha256,
    progress,
    say,
    write_atomic,
)

from .play.session_log import Event, RecordedSession, Reset, Rewind, Settings, Step, versions

if TYPE_CHECKING:
    from .play.film import Film
    from .world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """Play a session again, check that every code is the same, and make a video of it.

        worldloom replay runs/demo/sessions/2026-01-31-200000

    Exit code 3 if a code differs; the first frame that does is named.
    """

    session: Positional[Path]
    """Folder that `worldloom play` wrote."""
    model: Annotated[Path | None, arg(metavar="PATH")] = None
    """The model directory, if it is not where it was."""
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None
    """The same of the tokenizer, named as `worldloom tokenize` takes it."""
    output: Annotated[Path | None, arg(metavar="PATH")] = None
    """The video; replay.mp4 in the session's folder if left out. An older one is replaced."""
    device: Annotated[str | None, arg(metavar="NAME")] = None
    """Where to compute; where it was played if left out, since others may round otherwise."""


def replay(config: ReplayConfig) -> Path:
    """Play a session again; return the video's path.

    Raises:
        FormatError: if it is no session, or a damaged one.
        MismatchError: if the model is another than was played, or a code comes out differently.
    """
    recorded = RecordedSession(config.session)
    total = sum(1 for _ in recorded.events())
    if total == 0:
        raise FormatError(f"{config.session}: nothing was played in this session")
    if recorded.torn:
        say(f"{config.session}: its last line is cut short, as a kill leaves it; replayed up to it")
    from .devices import computing_with

    world = _world(config, recorded)
    output = config.output or config.session / "replay.mp4"
    again = _Again(world, recorded)

    def write(file: BinaryIO) -> None:
        # The encoder opens its file by name; this one is the temporary of what becomes `output`.
        with again.filming(Path(file.name)):
            for number, event in progress(recorded.events(), "replaying", total=total):
                again.do(number, event)

    with computing_with(recorded.header.threads):
        write_atomic(output, write)
    starts = "1 start" if again.starts == 1 else f"{again.starts} starts"
    say(f"{again.steps} steps from {starts}: the same codes again; look at {output}")
    return output


class _Again:
    """Does events again, and compares."""

    def __init__(self, world: "World", recorded: RecordedSession) -> None:
        from .play.session import PlaySession

        self.steps = 0
        self.starts = 0
        self._recorded = recorded
        self._session = PlaySession(world, (), sampling=world.sampling, seed=0, log=None)
        self._sampling = world.sampling
        self._path: Path | None = None
        self._film: Film | None = None

    @contextmanager
    def filming(self, path: Path) -> Iterator[None]:
        """Film what is done in the block, from its first frame on, which tells the size."""
        self._path = path
        try:
            yield
        finally:
            if self._film is not None:
                self._film.close()

    def do(self, number: int, event: Event, /) -> None:
        """Do one event; `number` is its line."""
        where = f"{self._recorded.folder / 'events.jsonl'}: line {number}"
        try:
            frames_THWC = self._done(event, where)
        except ConfigError as error:  # settings that are none for this model, say
            raise FormatError(f"{where}: {error}") from error
        if frames_THWC is not None:
            self._draw(frames_THWC)

    def _done(self, event: Event, where: str) -> Frames | None:
        """Do an event; return what it shows, if anything new."""
        session = self._session
        match event:
            case Reset():
                session.sampling = self._sampling = event.sampling
                self.starts += 1
                return session.begin(_point(event), seed=event.seed).frames_THWC
            case Settings():
                self._sampling = event.sampling
                return None
            case Rewind():
                return session.rewind(event.position).frames_THWC[-1:]
            case Step():
                session.sampling = self._sampling
                shown = session.step(event.slots_rA)
                self.steps += 1
                if not np.array_equal(shown.codes_hw, event.codes_hw):
                    raise MismatchError(
                        f"{where}: step {self.steps} of the session, position {shown.position} of "
                        f"start {self.starts}, is the first whose codes differ: "
                        f"{_difference(event.codes_hw, shown.codes_hw)}. {self._reason()}"
                    )
                return shown.frames_THWC

    def _reason(self) -> str:
        """Return why codes may differ although model and tokenizer are the same."""
        then, now = self._recorded.header.versions, versions()
        if dict(then) != now:
            return f"It was played with other versions: {describe_difference(then, now)}"
        return (
            f"It was played on {self._recorded.header.device}; another device or processor may "
            "round otherwise. Else the session was altered, or this is a defect worth reporting"
        )

    def _draw(self, frames_THWC: Frames) -> None:
        """Add frames to the film, which the first one begins."""
        if self._film is None:
            from .play.film import Film

            assert self._path is not None
            fps = self._recorded.header.fps
            self._film = Film(self._path, fps=fps, first_HWC=frames_THWC[0])
            frames_THWC = frames_THWC[1:]
        self._film.add(frames_THWC)


def _world(config: ReplayConfig, recorded: RecordedSession) -> "World":
    """Load the world that was played, and no other."""
    from worldloom.dynamics import SamplingConfig

    from .devices import choose_device
    from .world import World

    header = recorded.header
    model = config.model or recorded.model
    tokenizer = config.tokenizer or recorded.tokenizer
    if not (model / "config.json").is_file():
        raise FormatError(
            f"{model}: the model that was played is not there; say where it is with --model"
        )
    if tokenizer is None:
        raise FormatError(
            f"{recorded.folder}: was played with a tokenizer that is no folder; name it with "
            "--tokenizer"
        )
    if file_sha256(model / "config.json") != header.model_sha256:
        raise MismatchError(
            f"{model}: is another model than the one that was played, so that its codes would be "
            "others; name that one with --model"
        )
    device = choose_device(config.device or header.device)
    # A Path is a folder and nothing else; as a text, a file's "module:Class" would be imported.
    world = World.from_pretrained(model, tokenizer, sampling=SamplingConfig(), device=device)
    spec = world.model.spec
    if (recorded.actions, recorded.codes) != (spec.actions, spec.tokenizer.codes):
        raise MismatchError(
            f"{recorded.folder / 'session.json'}: its actions or codes are not those of its model "
            f"{model}; the file was altered"
        )
    return world


def _point(event: Reset) -> Any:
    """Return the start of a session as a place to begin."""
    import torch

    from .play.start_points import StartPoint
    from .starts import Start

    none = np.zeros((0, event.slots_TA.shape[1]), np.int64)
    start = Start(torch.from_numpy(event.codes_thw), event.slots_TA, none, None, event.start)
    return StartPoint(start, np.zeros((0, 0, 3), np.uint8), event.start)


def _difference(then_hw: npt.NDArray[Any], now_hw: npt.NDArray[Any]) -> str:
    """Return how many codes differ, and the first that does."""
    places = np.argwhere(then_hw != now_hw)
    first = tuple(places[0].tolist())
    return (
        f"{len(places)} of {then_hw.size}, the first in cell {first}, {int(then_hw[first])} then "
        f"and {int(now_hw[first])} now"
    )
