"""What a player's page and the server say to each other: worldloom.play/1, docs/protocol.md.

    JSON text from the page  -> parse_message -> one of the messages below, or a FormatError
    a frame's header, images -> pack_frame    -> the bytes of one binary message

Nothing that a page sends is trusted: sizes, names, ranges and types are checked here, once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worldloom.common import FormatError, nearest, parse_json

VERSION = 1
SUBPROTOCOL = "worldloom.play.1"
MAX_MESSAGE_BYTES = 16 << 10
MAX_PICTURE_BYTES = 8 << 20

WINDOW_STEPS = 8
"""Steps whose frames may be on their way. Kernels, tunnels and browsers hold hundreds of frames for
a page that is behind; it says what it has seen, and the others wait here, where old ones go."""

CLOSE_TAKEN_OVER = 4001
"""The same page connected again elsewhere."""
CLOSE_BUSY = 4009
"""Somebody else is playing."""

_MAX_HELD = 64
_MAX_NAME = 100
_MAX_COUNT = 1 << 53
"""Numbers above this are not exact in JavaScript."""
MIN_PACE, MAX_PACE = 0.01, 1000.0
"""Frames a second. A slower clock than that would overflow some day."""


@dataclass(frozen=True, slots=True)
class Input:
    """What is held from now on."""

    held: tuple[str, ...]
    """Names of controls, in the order in which they were pressed."""
    n: int
    """The page's own count; frames that this input led to carry it."""


@dataclass(frozen=True, slots=True)
class Run:
    """Go on by itself, or stand still."""

    on: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One step, while it stands still."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Begin again."""

    start: int | None = None
    """Of the gallery; absent: where it began last."""
    picture: str | None = None
    """What POST /picture answered."""
    seed: int | None = None
    """Absent: the same as before."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Draw what follows in another way."""

    values: Mapping[str, Any]
    """Fields of SamplingConfig."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How many pixel frames a second; 0 as many as can be."""

    frames_per_s: float


@dataclass(frozen=True, slots=True)
class Rewind:
    """Go back, or forward again, to a position that was."""

    position: int


@dataclass(frozen=True, slots=True)
class Autoplay:
    """Let the model's own action head choose."""

    on: bool


@dataclass(frozen=True, slots=True)
class Compare:
    """Show something beside the world: `with` on the wire, which is a word of Python."""

    beside: str


@dataclass(frozen=True, slots=True)
class Record:
    """Keep what is shown from now on, or stop and hand it over."""

    on: bool


@dataclass(frozen=True, slots=True)
class Format:
    """How frames are packed from now on."""

    image: Literal["jpeg", "png"]


@dataclass(frozen=True, slots=True)
class Seen:
    """How many frames came through this socket so far; see `WINDOW_STEPS`."""

    frames: int


Message = (
    Input
    | Run
    | Step
    | Reset
    | Settings
    | Pace
    | Rewind
    | Autoplay
    | Compare
    | Record
    | Format
    | Seen
)


def parse_message(text: str | bytes, /) -> Message:
    """Return what a page said.

    Raises:
        FormatError: if it is not one of the messages, in a sentence for whoever wrote the page.
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(content) > MAX_MESSAGE_BYTES:
        raise FormatError(
            f"message: {len(content)} bytes, at most {MAX_MESSAGE_BYTES} are taken at once"
        )
    data = parse_json(content, where="message")
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise FormatError("message: must be a JSON object with a text called type")
    kind = data.pop("type")
    if kind not in _KINDS:
        raise FormatError(f"message: type {kind!r:.60} is unknown{nearest(kind, list(_KINDS))}")
    build, fields, required = _KINDS[kind]
    for name in data:
        if name not in fields:
            raise FormatError(f"{kind}: field {name!r:.60} is unknown{_among(name, fields)}")
    for name in required:
        if name not in data:
            raise FormatError(f"{kind}: field {name!r} is missing")
    return build({name: fields[name](value, f"{kind}: {name}") for name, value in data.items()})


def pack_text(message: Mapping[str, Any], /) -> str:
    """Return a message to the page as JSON text."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False)


def pack_frame(header: Mapping[str, Any], images: Sequence[bytes], /) -> bytes:
    """Return one binary message: the header's length, the header, the images one after another.

    Args:
        header: of the frame; `sizes` is filled in.
        images: the world's, then what is beside it, if anything is.
    """
    text = pack_text({**header, "sizes": [len(image) for image in images]}).encode()
    return b"".join((len(text).to_bytes(4, "little"), text, *images))


def unpack_frame(message: bytes, /) -> tuple[dict[str, Any], list[bytes]]:
    """Return (header, images): what `pack_frame` joined.

    Raises:
        FormatError: if the message is not one of its kind.
    """
    length = int.from_bytes(message[:4], "little")
    if len(message) < 4 or 4 + length > len(message):
        raise FormatError(f"frame: {len(message)} bytes do not hold a header of {length}")
    header = parse_json(message[4 : 4 + length], where="frame")
    sizes = header.get("sizes") if isinstance(header, dict) else None
    if not isinstance(sizes, list) or sum(sizes) != len(message) - 4 - length:
        raise FormatError("frame: sizes do not add up to the bytes that follow the header")
    images, at = [], 4 + length
    for size in sizes:
        images.append(message[at : at + size])
        at += size
    return header, images


def _among(name: str, fields: Mapping[str, object]) -> str:
    return nearest(name, list(fields)) if fields else "; it has none"


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise FormatError(f"{where} must be true or false, got {value!r:.60}")
    return value


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
        raise FormatError(f"{where} must be a whole number, 0 to 2**53, got {value!r:.60}")
    return value


def _number(value: object, where: str) -> float:
    # An int may be too large for a float, and JSON's 1e999 is read as infinity.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
        raise FormatError(f"{where} must be a number, at most 1e9, got {value!r:.60}")
    return float(value)


def _pace(value: object, where: str) -> float:
    pace = _number(value, where)
    if pace != 0 and not MIN_PACE <= pace <= MAX_PACE:
        raise FormatError(
            f"{where} is {pace:g}, must be in [{MIN_PACE:g}, {MAX_PACE:g}], or 0 for no limit"
        )
    return pace


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise FormatError(f"{where} must be a text of at most {_MAX_NAME}, got {value!r:.60}")
    return value


def _held(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MAX_HELD:
        raise FormatError(
            f"{where} must be a list of at most {_MAX_HELD} controls, got {value!r:.60}"
        )
    names = tuple(_name(name, where) for name in value)
    if len(set(names)) != len(names):
        raise FormatError(f"{where} names a control twice; one cannot be pressed while it is held")
    return names


def _one_of(*words: str) -> Callable[[object, str], str]:
    def check(value: object, where: str) -> str:
        if value not in words:
            raise FormatError(f"{where} must be {' or '.join(words)}, got {value!r:.60}")
        return str(value)

    return check


_Build = Callable[[dict[str, Any]], Message]
_Fields = Mapping[str, Callable[[object, str], Any]]
_KINDS: Mapping[str, tuple[_Build, _Fields, Sequence[str]]] = {
    "input": (lambda data: Input(**data), {"held": _held, "n": _count}, ("held", "n")),
    "run": (lambda data: Run(**data), {"on": _flag}, ("on",)),
    "step": (lambda _data: Step(), {}, ()),
    "reset": (
        lambda data: Reset(**data),
        {"start": _count, "picture": _name, "seed": _count},
        (),
    ),
    "settings": (
        lambda data: Settings(data),
        {
            "temperature": _number,
            "min_p": _number,
            "top_p": _number,
            "top_k": _count,
            "guidance_scale": _number,
            "parallel_keep_frac": _number,
            "decoder": _name,
            "refinements": _count,
        },
        (),
    ),
    "pace": (lambda data: Pace(**data), {"frames_per_s": _pace}, ("frames_per_s",)),
    "rewind": (lambda data: Rewind(**data), {"position": _count}, ("position",)),
    "autoplay": (lambda data: Autoplay(**data), {"on": _flag}, ("on",)),
    "compare": (lambda data: Compare(data["with"]), {"with": _name}, ("with",)),
    "record": (lambda data: Record(**data), {"on": _flag}, ("on",)),
    "seen": (lambda data: Seen(**data), {"frames": _count}, ("frames",)),
    "format": (lambda data: Format(**data), {"image": _one_of("jpeg", "png")}, ("image",)),
}
"""Of each type: what it builds, its fields and what checks them, the fields that must be there."""
