"""What the two halves agree on, and how they recognise each other.

    CodeSpec        what a code array means to the dynamics: vocabulary, grid, time
    TokenizerSpec   which tokenizer wrote it: pixels, resize rule, fingerprint

Both are plain values that travel inside manifests, model directories and checkpoints as JSON.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from .errors import FormatError, MismatchError
from .files import to_json

ResizeRule = Literal["exact", "stretch", "crop", "pad"]
"""How frames of another size become the tokenizer's size.

    exact    they do not: another size is refused
    stretch  each axis is scaled by itself; the aspect ratio changes
    crop     scaled until both axes cover, then cut at the centre
    pad      scaled until both axes fit, then black bars
"""

_COMPUTE_DTYPES = ("float32", "bfloat16")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def check_fields(cls: type, data: Mapping[str, Any], /, *, where: str) -> None:
    """Refuse a table that has not exactly the fields of a dataclass."""
    known = {field.name for field in fields(cls)}
    for key in sorted(set(data) ^ known, key=str):
        verb = "has an unknown" if key in data else "lacks the"
        raise FormatError(f"{where}: {cls.__name__} {verb} field {key!r:.60}")


def check_count(
    where: str, name: str, value: object, /, *, low: int = 1, high: int = 1 << 31
) -> None:
    """Refuse anything but an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FormatError(
            f"{where}: {name} must be an integer in [{low}, {high}], got {value!r:.60}"
        )


def check_rate(where: str, name: str, value: object, /) -> float:
    """Return a number in [0, 10**6) as a float; frames per second, for example."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e6:
        raise FormatError(f"{where}: {name} must be a number in [0, 1000000), got {value!r:.60}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeSpec:
    """What codes_Bthw means: enough to build and train a dynamics model."""

    vocab_size: int
    """Number of codes, V; a code is an integer in [0, V)."""
    grid_height: int
    """Rows of cells in a latent frame, h."""
    grid_width: int
    """Columns of cells in a latent frame, w."""
    code_dim: int
    """Length of a codebook vector, Z."""
    frames_per_latent: int = 1
    """Temporal stride r: latent frame 0 covers 1 pixel frame, each later one r."""
    num_levels: int = 1
    """Residual quantizer levels per cell, Q; with Q > 1 code arrays have a last axis Q."""

    def __post_init__(self) -> None:
        """Refuse sizes that no array can have."""
        for field in fields(self):
            check_count("CodeSpec", field.name, getattr(self, field.name))

    @property
    def cells(self) -> int:
        """Cells per latent frame, S = h * w."""
        return self.grid_height * self.grid_width

    @property
    def dtype(self) -> str:
        """The smallest unsigned integer type that holds the vocabulary, as numpy spells it."""
        return next(
            name
            for name, limit in (("uint8", 1 << 8), ("uint16", 1 << 16), ("uint32", 1 << 32))
            if self.vocab_size <= limit
        )

    def latent_frames(self, num_frames: int, /) -> int:
        """Return t, the latent frames that cover `num_frames` >= 1 pixel frames."""
        return 1 + -(-(num_frames - 1) // self.frames_per_latent)

    def pixel_frames(self, latent_frames: int, /) -> int:
        """Return T, the most pixel frames that `latent_frames` >= 1 can cover."""
        return 1 + (latent_frames - 1) * self.frames_per_latent

    def codes_shape(self, latent_frames: int, /) -> tuple[int, ...]:
        """Return the shape of the codes of that many latent frames: (t, h, w) or (t, h, w, Q)."""
        levels = (self.num_levels,) if self.num_levels > 1 else ()
        return (latent_frames, self.grid_height, self.grid_width, *levels)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /, *, where: str) -> Self:
        """Rebuild from JSON values; `where` names the file in errors."""
        if not isinstance(data, Mapping):
            raise FormatError(f"{where}: CodeSpec must be an object, got {type(data).__name__}")
        check_fields(cls, data, where=where)
        for name, value in data.items():
            check_count(where, f"CodeSpec.{name}", value)
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Which tokenizer: what its codes mean, the pixels it takes, and its fingerprint."""

    name: str
    """Kind of tokenizer, as the entry-point group `worldloom.tokenizers` calls it."""
    codes: CodeSpec
    height: int
    """Height of the frames it encodes and decodes, H."""
    width: int
    """Width of the frames it encodes and decodes, W."""
    resize: ResizeRule
    """What happens to frames of another size."""
    fps: float
    """Pixel frames per second of what it was trained on; 0 if it does not matter."""
    frame_skip: int
    """Game frames per pixel frame of what it was trained on; 0 if it does not matter."""
    compute_dtype: str
    """The dtype codes are computed in, "float32" or "bfloat16"."""
    fingerprint: str
    """SHA-256 of the canonical config and the weights, 64 hexadecimal digits."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /, *, where: str) -> Self:
        """Rebuild from JSON values; `where` names the file in errors."""
        if not isinstance(data, Mapping):
            raise FormatError(f"{where}: TokenizerSpec must be an object, got {data!r:.40}")
        check_fields(cls, data, where=where)
        for name in ("height", "width"):
            check_count(where, f"TokenizerSpec.{name}", data[name], high=1 << 16)
        check_count(where, "TokenizerSpec.frame_skip", data["frame_skip"], low=0)
        fps = check_rate(where, "TokenizerSpec.fps", data["fps"])
        for name in ("name", "resize", "compute_dtype", "fingerprint"):
            if not isinstance(data[name], str):
                raise FormatError(f"{where}: TokenizerSpec.{name} must be a string")
        for name, known in (("resize", get_args(ResizeRule)), ("compute_dtype", _COMPUTE_DTYPES)):
            if data[name] not in known:
                raise FormatError(
                    f"{where}: TokenizerSpec.{name} is {data[name]!r:.60}; "
                    f"known are {', '.join(known)}"
                )
        if not _FINGERPRINT.fullmatch(data["fingerprint"]):
            raise FormatError(
                f"{where}: TokenizerSpec.fingerprint is {data['fingerprint']!r:.70}, "
                "must be a SHA-256, 64 hexadecimal digits"
            )
        codes = CodeSpec.from_dict(data["codes"], where=where)
        return cls(**{**data, "codes": codes, "fps": fps})

    def require(self, other: "TokenizerSpec", /, *, here: str, there: str) -> None:
        """Refuse another tokenizer than this one, naming every field that differs.

        Raises:
            MismatchError: if the two differ in any field.
        """
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        differ = [key for key in mine if mine[key] != theirs[key]]
        if differ:
            raise MismatchError(
                f"{there}: made with tokenizer {other.fingerprint[:16]}, but {here} has "
                f"{self.fingerprint[:16]}; the same code means different pixels to each. "
                + "They differ in "
                + ", ".join(
                    f"{key} ({theirs[key]!r:.24} against {mine[key]!r:.24})" for key in differ
                )
                + ". Use the tokenizer that wrote the shards, or run `worldloom tokenize` again."
            )


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Lift the fields of nested objects to one level, named a.b."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in _flat(value).items()})
        else:
            flat[key] = value
    return flat


def fingerprint(config: object, weights: Iterable[tuple[str, bytes]]) -> str:
    """Return the SHA-256, in hexadecimal, of a canonical config and named weight bytes.

    Args:
        config: JSON values; hashed as canonical JSON.
        weights: (name, little-endian bytes in row-major order) of every weight; the order does
            not matter.
    """
    digest = hashlib.sha256(to_json(config, indent=None).encode())
    for name, content in sorted(weights, key=lambda item: item[0]):
        digest.update(f"\0{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
