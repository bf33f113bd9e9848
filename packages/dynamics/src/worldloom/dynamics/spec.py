"""What a dynamics model was trained on. Needs no torch.

    DynamicsSpec  <->  JSON values, in config.json of a model directory

A model directory names nothing else: whoever has it knows which codes and actions it speaks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from worldloom.common import ActionSpec, FormatError, TokenizerSpec, TokenShards


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsSpec:
    """What a dynamics model was trained on: it works with nothing else."""

    tokenizer: TokenizerSpec
    actions: ActionSpec
    fps: float
    """Pixel frames per second of the world; 0 if it does not matter."""
    frame_skip: int
    """Game frames per pixel frame; 0 if it does not matter."""

    @classmethod
    def of(cls, shards: TokenShards, /, *others: TokenShards) -> Self:
        """Return the spec of a model that is trained on these shards.

        Of several folders that `check_alike` has passed, those with actions say what they are.
        """
        every = (shards, *others)
        first = next((one for one in every if one.actions.kind != "none"), shards)
        return cls(
            tokenizer=first.tokenizer,
            actions=first.actions,
            fps=first.fps,
            frame_skip=first.frame_skip,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "tokenizer": self.tokenizer.to_dict(),
            "actions": self.actions.to_dict(),
            "fps": self.fps,
            "frame_skip": self.frame_skip,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /, *, where: str) -> Self:
        """Rebuild from JSON values; `where` names the file in errors.

        Raises:
            FormatError: if a field is missing, unknown or of the wrong type.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise FormatError(f"{where}: a dynamics spec has the fields {', '.join(sorted(names))}")
        fps, frame_skip = data["fps"], data["frame_skip"]
        if type(fps) not in (int, float) or not 0 <= fps < math.inf:
            raise FormatError(f"{where}: fps is {fps!r:.40}, must be a number, 0 or more")
        if type(frame_skip) is not int or frame_skip < 0:
            raise FormatError(f"{where}: frame_skip is {frame_skip!r:.40}, must be a count")
        return cls(
            tokenizer=TokenizerSpec.from_dict(data["tokenizer"], where=where),
            actions=ActionSpec.from_dict(data["actions"], where=where),
            fps=float(fps),
            frame_skip=frame_skip,
        )
