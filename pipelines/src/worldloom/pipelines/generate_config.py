"""What `worldloom generate` is asked for. Needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from worldloom.common import ConfigError
from worldloom.dynamics import SamplingConfig

from .checks import require_at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    r"""Generate video: start from real frames, press actions, watch.

        worldloom generate --model runs/demo/dynamics/model \
            --tokenizer runs/demo/tokenizer/model --start runs/demo/shards \
            --actions "MOVE_RIGHT*12,ATTACK*2" --output out

    Many starts at once, each beside what truly happened:

        worldloom generate --model runs/demo/dynamics/model \
            --tokenizer runs/demo/tokenizer/model --start runs/demo/shards \
            --num-starts 16 --actions true --output out
    """

    actions: str
    """What to press: words such as MOVE_RIGHT*12,ATTACK*2 (separated by ; where an action has
    several numbers, as in 0.5,0*12;0,0*4), null where none is given; a file of them (.json, .txt,
    .npy of slots: docs/formats.md), or one for each start, separated by commas; `true` for those of
    the episode, which draws the true frames beside; or `random` or `sticky`, the same for every
    start."""
    model: Path
    """Model directory that train-dynamics wrote."""
    tokenizer: str
    """The tokenizer that wrote the model's shards, named as `worldloom tokenize` takes it."""
    start: Path
    """Where it starts: a folder of token shards, a folder of episodes, or a picture."""
    output: Path
    """Folder for the video, the pictures and the codes; of several starts, a folder each in it.
    One that generate wrote is replaced."""
    episode: str = "0"
    """Which episode of --start: its key, or its number among the held-out ones. Several, separated
    by commas, run as one batch."""
    start_frame: int = 0
    """Frame of the episode where the prompt begins."""
    num_starts: int = 0
    """Take so many held-out starts instead of --episode: the beginning of every held-out episode,
    then later moments of each."""
    prompt_frames: int = 4
    """Latent frames given; the rest is generated. A picture is one."""
    horizon: int = 32
    """Frames to generate where the actions have no end of their own (true, random, sticky)."""
    seed: int = 0
    """Of all that is drawn; sample k of every start uses seed + k. The same seed gives the same
    codes, whatever else is generated with it, but where two scores tie within rounding."""
    num_samples: int = 1
    """How many futures of the same start and actions."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How codes are drawn."""
    compare_decoders: bool = False
    """Do the same job with every decoder of the model's order, too, and report how fast each was
    and whether its codes are the same."""
    scale: int = 4
    """Every pixel becomes a square of this many pixels a side."""
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one), cpu, cuda, mps."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to do, and starts named twice over."""
        require_at_least(1, self, "prompt_frames", "horizon", "num_samples", "scale")
        require_at_least(0, self, "start_frame", "num_starts")
        if not all(self.episodes):
            raise ConfigError(
                f"--episode {self.episode!r}: names no episode; give keys or numbers, separated by "
                "commas"
            )
        if len(set(self.episodes)) < len(self.episodes):
            raise ConfigError(
                f"--episode {self.episode!r}: names an episode twice; for several futures of it "
                "use --num-samples"
            )
        if self.num_starts and (self.episode, self.start_frame) != ("0", 0):
            raise ConfigError(
                "--num-starts chooses the starts itself; leave out --episode and --start-frame, "
                "or --num-starts"
            )

    @property
    def episodes(self) -> tuple[str, ...]:
        """The episodes that --episode names."""
        return tuple(word.strip() for word in self.episode.split(","))
