"""What an environment is made of: a world's files, its starts, and how both are drawn from.

    WorldEnvConfig             -> WorldSource: the spec at once, weights when first needed
    a generator, reset options -> WorldSource.draw -> Start, seed of all that follows

Making an environment reads two small files and loads no torch, so that a process may make many and
fork before the first of them is reset.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from worldloom.common import ConfigError, FormatError, read_json
from worldloom.dynamics import DynamicsSpec, SamplingConfig

from .checks import require_at_least
from .play.worlds import WorldFiles, world_files

if TYPE_CHECKING:
    from .starts import Moment, Start
    from .world import World

_APART_FRAMES = 16
"""Pixel frames between two starts of an episode: near enough for many, too far to be alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldEnvConfig:
    """Which world, where it starts, and for how long it goes on."""

    world: Path | str | None = None
    """A folder that `worldloom demo` wrote; or name the parts, the next three."""
    model: Path | str | None = None
    """Model directory that train-dynamics wrote."""
    tokenizer: Path | str | None = None
    """The tokenizer that wrote the model's shards."""
    start: Path | str | None = None
    """Token shards or episodes, whose held-out episodes it starts in; or a picture."""
    prompt_frames: int = 4
    """Latent frames of an episode that the world is given before the first action."""
    max_steps: int = 300
    """Steps after which an episode is truncated."""
    sampling: SamplingConfig | Mapping[str, Any] = field(default_factory=SamplingConfig)
    """How codes are drawn; a mapping such as {"temperature": 1.0} changes some of it."""
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one), cpu, cuda, mps."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to do, and a world that is not named."""
        require_at_least(1, self, "prompt_frames", "max_steps")
        if self.world is None and (self.model is None or self.tokenizer is None):
            raise ConfigError(
                "no world is named: pass world='runs/demo', a folder that `worldloom demo` wrote, "
                "or model=... and tokenizer=..., and start=... for where it starts"
            )

    @property
    def files(self) -> WorldFiles:
        """The files, found or named."""
        if self.world is not None:
            files = world_files(Path(self.world))
        else:
            files = WorldFiles(str(self.model), Path(), "", None, None)
        return replace(
            files,
            model=files.model if self.model is None else Path(self.model),
            tokenizer=files.tokenizer if self.tokenizer is None else str(self.tokenizer),
            starts=files.starts if self.start is None else Path(self.start),
        )


class WorldSource:
    """Starts and seeds of a world, and the world itself when it is wanted."""

    def __init__(self, config: WorldEnvConfig, /) -> None:
        """Read what the world speaks; the weights are not touched.

        Raises:
            FormatError: if the world's files are not there or not what they should be.
            ConfigError: if a sampling setting is unknown or out of range.
        """
        self.config = config
        self.files = config.files
        path = self.files.model / "config.json"
        content = read_json(path, what="the config of a model directory")
        about = content.get("config")
        if content.get("kind") != "dynamics" or not isinstance(about, dict):
            raise FormatError(
                f"{self.files.model}: is no model directory that train-dynamics wrote"
            )
        self.spec = DynamicsSpec.from_dict(about.get("spec", {}), where=str(path))
        self.sampling = _sampling(config.sampling)
        self._moments: list[Moment] | None = None
        self._starts: dict[int, Start] = {}

    @property
    def steps_per_s(self) -> int:
        """Actions a second at the world's natural pace, to the nearest whole one.

        gymnasium.utils.play takes no fraction. 10 pixel frames a second where nothing is known.
        """
        r = self.spec.tokenizer.codes.frames_per_latent
        return max(1, round((self.spec.fps or 10.0) / r))

    @cached_property
    def world(self) -> "World":
        """The world, loaded when it is first asked for."""
        from .devices import choose_device
        from .world import World

        return World.from_pretrained(
            self.files.model,
            self.files.tokenizer,
            sampling=self.sampling,
            device=choose_device(self.config.device),
        )

    def draw(
        self, rng: np.random.Generator, options: Mapping[str, Any] | None, /
    ) -> "tuple[Start, int]":
        """Return a start and the seed of all that follows it.

        Both are drawn whatever the options say, so that the seed does not depend on them.

        Args:
            rng: draws them.
            options: at most one of {"start": number}, {"episode": key} (with "start_frame", if it
                is not 0) and {"picture": path, bytes or frame_HWC uint8}.

        Raises:
            ConfigError: if the options name no start there is.
            FormatError: if it cannot be read.
        """
        from .starts import Moment, read_start, start_from_picture

        options = dict(options or {})
        drawn, seed = rng.random(), int(rng.integers(1 << 62))
        known = {"start", "episode", "start_frame", "picture"}
        places = set(options) - {"start_frame"}
        stray = "start_frame" in options and places != {"episode"}
        if places - known or len(places) > 1 or stray:
            raise ConfigError(
                f"reset options {sorted(options)}: take one of start (a number), episode (a key, "
                "with start_frame if it is not 0) and picture (a path, bytes or an array)"
            )
        if "picture" in options:
            picture = options["picture"]
            picture = Path(picture) if isinstance(picture, str) else picture
            if not isinstance(picture, Path | bytes | np.ndarray):
                raise ConfigError(
                    f"reset option picture is of type {type(picture).__name__}, must be a path, "
                    "bytes or an array"
                )
            name = picture.name if isinstance(picture, Path) else "a picture"
            return start_from_picture(picture, self.world, source=name), seed
        starts = self.files.starts
        if starts is None:
            raise ConfigError(
                f"{self.files.name}: has neither token shards nor episodes to start from; pass "
                "start=... (a folder of them, or a picture), or options={'picture': ...} to reset"
            )
        if "episode" in options:
            frame = options.get("start_frame", 0)
            if not isinstance(frame, int | np.integer):
                raise ConfigError(
                    f"reset option start_frame is {frame!r:.40}, must be a pixel frame's number"
                )
            moment = Moment(
                episode=str(options["episode"]),
                start_frame=int(frame),
                prompt_frames=self.config.prompt_frames,
                sequel_steps=0,
            )
            return read_start(starts, self.world, moment, with_frames=False), seed
        if starts.is_file():
            return start_from_picture(starts, self.world, source=starts.name), seed
        count = len(self.moments())
        number = options.get("start", int(drawn * count))
        if not isinstance(number, int | np.integer) or not 0 <= number < count:
            raise ConfigError(
                f"reset option start is {number!r:.40}, must be a number from 0 to {count - 1}: "
                f"{starts} has {count} held-out starts"
            )
        return self._start(starts, int(number)), seed

    def _start(self, path: Path, number: int) -> "Start":
        """Return a held-out start; it is read once, as environments come back to it for ever."""
        from .starts import read_start

        if number not in self._starts:
            moment = self.moments()[number]
            start = read_start(path, self.world, moment, with_frames=False)
            self._starts[number] = replace(start, true_frames_THWC=None)
        return self._starts[number]

    def moments(self) -> "list[Moment]":
        """Return the held-out starts, by their numbers; none of a picture."""
        from .starts import held_out_moments

        if self._moments is None:
            starts = self.files.starts
            found = [] if starts is None or starts.is_file() else held_out_moments(
                starts, self.world, prompt_frames=self.config.prompt_frames,
                apart_frames=_APART_FRAMES,
            )  # fmt: skip
            self._moments = [replace(moment, sequel_steps=0) for moment in found]
        return self._moments


def _sampling(sampling: SamplingConfig | Mapping[str, Any]) -> SamplingConfig:
    """Return the settings."""
    if isinstance(sampling, SamplingConfig):
        return sampling
    try:
        return SamplingConfig(**sampling)
    except TypeError as error:
        raise ConfigError(f"sampling: {error}") from error
