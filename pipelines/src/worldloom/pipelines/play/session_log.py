"""A play session on disk: everything that was done, so that it can be done again.

    what a session does  -> SessionLog       -> SESSION/{session.json, events.jsonl}
    SESSION              -> RecordedSession  -> the same events, checked, one after another

session.json says which world it was; events.jsonl grows by a line an event and is never changed: a
process that is killed leaves at most its last line cut short, which readers pass by. The format is
in docs/formats.md. Nothing here needs torch.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    FormatError,
    SlotArray,
    build,
    file_sha256,
    parse_json,
    read_json,
    say,
    storage_errors,
    write_json,
)
from worldloom.dynamics import SamplingConfig

if TYPE_CHECKING:
    from ..world import World
    from .worlds import WorldFiles

PLAY_SCHEMA = "worldloom.play-session/1"
_NULL = -1
"""worldloom.dynamics.NULL, which is not imported: it would bring torch."""
_HEADER, _EVENTS = "session.json", "events.jsonl"
_HEADER_BYTES = 1 << 20
MAX_THREADS = 1024
"""More than any machine has cores for; a stranger's file must not start millions."""
_LINE_BYTES = 1 << 24
"""A prompt of hundreds of large frames fits. A stranger's line must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Reset:
    """A start."""

    start: str
    """For people: what it was."""
    seed: int
    sampling: SamplingConfig
    codes_thw: npt.NDArray[Any]
    """The prompt, int64; (t, h, w, Q) where cells have levels."""
    slots_TA: SlotArray
    """The actions between its frames; NULL where nobody knows them."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How codes are drawn in all steps until the next settings, whatever is rewound."""

    sampling: SamplingConfig


@dataclass(frozen=True, slots=True)
class Step:
    """Actions, and what came of them."""

    slots_rA: SlotArray
    codes_hw: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Rewind:
    """The next step goes on from this position."""

    position: int


Event = Reset | Settings | Step | Rewind


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHeader:
    """Which world a session was played in: the content of session.json."""

    schema: str
    world: str
    """As people called it."""
    model: str
    """Model directory, seen from the session's folder."""
    model_sha256: str
    """Of the model directory's config.json, which has the hash of the weights."""
    tokenizer: str
    """The same of the tokenizer; empty where it was no folder."""
    fingerprint: str
    """Of the tokenizer."""
    codes: Mapping[str, Any]
    """The grid, as in the manifest of token shards."""
    actions: Mapping[str, Any]
    """The actions, as in all files."""
    fps: float
    """Frames a second of the recordings; 0 where they had none."""
    device: str
    threads: int
    """That computed on a CPU, since others may round otherwise."""
    began: str
    """When, ISO 8601; for people."""
    versions: Mapping[str, Any]
    """Of worldloom, torch and numpy; for people who find that it does not replay."""


def _num_threads() -> int:
    """Return with how many torch computes now, where a world was loaded by it."""
    import torch

    return torch.get_num_threads()


def versions() -> dict[str, str]:
    """Return those of what a session's codes depend on."""
    return {name: version(name) for name in ("worldloom", "torch", "numpy")}


class SessionLog:
    """Writes one session as it goes."""

    def __init__(
        self, sessions: Path, /, *, files: "WorldFiles", world: "World", now: datetime
    ) -> None:
        """Make a folder of its own, named by the time.

        Args:
            sessions: the folder that holds it.
            files: where the world is.
            world: the same, loaded.
            now: the time.

        Raises:
            StorageError: if it cannot be written.
        """
        spec = world.model.spec
        with storage_errors(sessions):
            self.folder = _new_folder(sessions, now.strftime("%Y-%m-%d-%H%M%S"))
            header = SessionHeader(
                schema=PLAY_SCHEMA,
                world=files.name,
                model=_seen_from(self.folder, files.model),
                model_sha256=file_sha256(files.model / "config.json"),
                tokenizer=(
                    _seen_from(self.folder, Path(files.tokenizer))
                    if Path(files.tokenizer).is_dir()
                    else ""
                ),
                fingerprint=spec.tokenizer.fingerprint,
                codes=spec.tokenizer.codes.to_dict(),
                actions=spec.actions.to_dict(),
                fps=spec.fps or 0.0,
                device=str(world.model.device),
                threads=_num_threads(),
                began=now.isoformat(timespec="seconds"),
                versions=versions(),
            )
            write_json(self.folder / _HEADER, asdict(header))
            # Unbuffered: a line is with the system at once, where a kill of us leaves it be.
            self._file: FileIO | None = (self.folder / _EVENTS).open("xb", buffering=0)
        self._sampling: SamplingConfig | None = None

    def reset(
        self,
        *,
        start: str,
        seed: int,
        sampling: SamplingConfig,
        codes_thw: npt.NDArray[Any],
        slots_TA: SlotArray,
    ) -> None:
        """Write a start; see `Reset`."""
        self._sampling = sampling
        self._write(
            event="reset",
            start=start,
            seed=seed,
            sampling=asdict(sampling),
            codes=codes_thw.reshape(len(codes_thw), -1).tolist(),
            slots=slots_TA.tolist(),
        )

    def step(
        self, *, slots_rA: SlotArray, codes_hw: npt.NDArray[Any], sampling: SamplingConfig
    ) -> None:
        """Write a step, and before it the settings if they are others than before."""
        if sampling != self._sampling:
            self._sampling = sampling
            self._write(event="settings", sampling=asdict(sampling))
        self._write(event="step", slots=slots_rA.tolist(), codes=codes_hw.ravel().tolist())

    def rewind(self, position: int, /) -> None:
        """Write that somebody went to a position."""
        self._write(event="rewind", position=position)

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, **event: object) -> None:
        """Append a line."""
        if self._file is None:
            return
        line = json.dumps(event, separators=(",", ":"), sort_keys=True, allow_nan=False)
        rest = line.encode() + b"\n"
        try:
            while rest:  # where room ends within a line, the next write says so
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            # A full disk ends the log, not the play.
            self.close()
            say(
                f"{self.folder}: {error.strerror or error}; the session's log ends here, at its "
                "last whole line, while play goes on. Make room and start again to have one"
            )


class RecordedSession:
    """Reads one session, of a stranger perhaps."""

    def __init__(self, folder: Path, /) -> None:
        """Read session.json.

        Raises:
            FormatError: if there is none, or it is not of a play session.
        """
        self.folder = folder
        path = folder / _HEADER
        content = read_json(path, what="a play session's header", limit_bytes=_HEADER_BYTES)
        if content.get("schema") != PLAY_SCHEMA:
            raise FormatError(
                f"{path}: expected schema {PLAY_SCHEMA}, found {content.get('schema')!r:.60}; it "
                "is another version's, or not of `worldloom play`"
            )
        where = str(path)
        self.header = build(SessionHeader, content, where=where, error=FormatError)
        self.actions = ActionSpec.from_dict(self.header.actions, where=where)
        self.codes = CodeSpec.from_dict(self.header.codes, where=where)
        if not 0 <= self.header.fps <= 1e6:
            raise FormatError(f"{where}: fps is {self.header.fps}, must be 0 to 1,000,000")
        if not 1 <= self.header.threads <= MAX_THREADS:
            raise FormatError(
                f"{where}: threads is {self.header.threads}, must be 1 to {MAX_THREADS}"
            )
        self.torn = False
        """Whether the last line was cut short, as far as has been read."""

    @property
    def model(self) -> Path:
        """The model directory, where it was when the session was played."""
        return Path(os.path.normpath(self.folder.resolve() / self.header.model))

    @property
    def tokenizer(self) -> Path | None:
        """The same of the tokenizer; None where it was no folder."""
        name = self.header.tokenizer
        return Path(os.path.normpath(self.folder.resolve() / name)) if name else None

    def events(self) -> Iterator[tuple[int, Event]]:
        """Yield (number of the line, event), each checked against the header and those before.

        Raises:
            FormatError: naming the line that is not an event, or cannot follow.
        """
        reader = _EventReader(self.actions, self.codes)
        for number, line in self._lines():
            yield number, reader.read(line, where=f"{self.folder / _EVENTS}: line {number}")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number, line) of every whole line."""
        path, self.torn = self.folder / _EVENTS, False
        if not path.exists():  # killed between the two files
            return
        if not path.is_file():
            raise FormatError(f"{path}: not a regular file; expected the events of a session")
        with storage_errors(path), path.open("rb") as file:
            number = 0
            while line := file.readline(_LINE_BYTES + 1):
                number += 1
                if len(line) > _LINE_BYTES:
                    raise FormatError(
                        f"{path}: line {number} is longer than {_LINE_BYTES} bytes; it is not an "
                        "event"
                    )
                if not line.endswith(b"\n"):
                    self.torn = True
                    return
                yield number, line


class _EventReader:
    """Turns lines into events; knows what may follow."""

    def __init__(self, actions: ActionSpec, codes: CodeSpec) -> None:
        self._actions = actions
        self._codes = codes
        self._length: int | None = None
        self._position = 0

    def read(self, line: bytes, /, *, where: str) -> Event:
        """Return the event of one line."""
        content = parse_json(line, where=where)
        if not isinstance(content, dict):
            raise FormatError(f"{where}: expected a JSON object, got {type(content).__name__}")
        kind = content.pop("event", None)
        match kind:
            case "reset":
                return self._reset(content, where)
            case "settings" | "step" | "rewind" if self._length is None:
                raise FormatError(f"{where}: a {kind} before the first reset; nothing has begun")
            case "settings":
                _require_fields(content, {"sampling"}, where)
                return Settings(_sampling(content["sampling"], where))
            case "step":
                return self._step(content, where)
            case "rewind":
                return self._rewind(content, where)
        raise FormatError(
            f"{where}: event is {kind!r:.60}, must be reset, settings, step or rewind"
        )

    def _reset(self, content: Mapping[str, Any], where: str) -> Reset:
        """Return a start, whose prompt is whole."""
        _require_fields(content, {"start", "seed", "sampling", "codes", "slots"}, where)
        if not isinstance(content["start"], str):
            raise FormatError(f"{where}: start is {content['start']!r:.60}, must be a text")
        seed = _whole(content["seed"], "seed", (1 << 63) - 1, where)
        frames = len(content["codes"]) if isinstance(content["codes"], list) else 0
        if frames == 0:
            raise FormatError(f"{where}: codes must be a list of one latent frame or more")
        shape = self._codes.codes_shape(frames)
        cells = int(np.prod(shape[1:]))
        codes = [self._frame(row, cells, where) for row in content["codes"]]
        steps = (frames - 1) * self._codes.frames_per_latent
        reset = Reset(
            content["start"],
            seed,
            _sampling(content["sampling"], where),
            np.array(codes, np.int64).reshape(shape),
            self._slots(content["slots"], steps, where),
        )
        self._position = self._length = 0
        return reset

    def _step(self, content: Mapping[str, Any], where: str) -> Step:
        """Return a step, which makes a position."""
        _require_fields(content, {"slots", "codes"}, where)
        shape = self._codes.codes_shape(1)[1:]
        codes = self._frame(content["codes"], int(np.prod(shape)), where)
        slots_rA = self._slots(content["slots"], self._codes.frames_per_latent, where)
        self._position += 1
        self._length = self._position
        return Step(slots_rA, np.array(codes, np.int64).reshape(shape))

    def _rewind(self, content: Mapping[str, Any], where: str) -> Rewind:
        """Return a rewind to a position that there is."""
        _require_fields(content, {"position"}, where)
        assert self._length is not None
        self._position = _whole(content["position"], "position", self._length, where)
        return Rewind(self._position)

    def _frame(self, row: object, cells: int, where: str) -> list[int]:
        """Return the codes of one latent frame."""
        return _integers(row, cells, 0, self._codes.vocab_size, f"{where}: codes")

    def _slots(self, rows: object, steps: int, where: str) -> SlotArray:
        """Return slots_TA of some steps; NULL, in all slots of a step, where no action is given."""
        spec = self._actions
        if not isinstance(rows, list) or len(rows) != steps:
            raise FormatError(f"{where}: slots must be a list of {steps} steps, got {rows!r:.60}")
        most = max(spec.sizes, default=0)
        read = [_integers(row, spec.num_slots, _NULL, most, f"{where}: slots") for row in rows]
        slots_TA = np.array(read, np.int64).reshape(steps, spec.num_slots)
        given_T = (slots_TA != _NULL).any(axis=1)
        spec.check_slots(slots_TA[given_T], where=where)
        return slots_TA


def _require_fields(content: Mapping[str, Any], names: set[str], where: str) -> None:
    """Refuse an event with other fields than its kind has."""
    if set(content) != names:
        raise FormatError(
            f"{where}: has the fields {', '.join(sorted(content)) or 'none'!s:.120}, must have "
            f"{', '.join(sorted(names))}"
        )


def _sampling(data: object, where: str) -> SamplingConfig:
    """Return settings, refusing values that are none."""
    return build(SamplingConfig, data, where=f"{where}: sampling", error=FormatError)


def _whole(value: object, name: str, most: int, where: str) -> int:
    """Return a whole number from 0 to `most`."""
    return _integers([value], 1, 0, most + 1, f"{where}: {name}")[0]


def _integers(row: object, count: int, low: int, high: int, where: str) -> list[int]:
    """Return a list of `count` integers in [low, high)."""
    if not isinstance(row, list) or len(row) != count:
        got = f"{len(row)} of them" if isinstance(row, list) else f"{row!r:.60}"
        raise FormatError(f"{where}: must be {count} integers, got {got}")
    for value in row:
        if type(value) is not int or not low <= value < high:
            raise FormatError(f"{where}: {value!r:.60}, must be an integer in [{low}, {high})")
    return row


def _new_folder(sessions: Path, name: str) -> Path:
    """Make and return a folder that was not there: NAME, NAME-2, NAME-3 ..."""
    sessions.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = sessions / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _seen_from(folder: Path, path: Path) -> str:
    """Return a path as seen from a folder, so that both may move together."""
    return os.path.relpath(path.resolve(), folder.resolve())
