"""Token shards -> a dynamics model: given codes and actions, the next frame's codes.

    worldloom train-dynamics --shards runs/doom/shards --output runs/doom/dynamics

reads SHARDS alone and writes RUN/{config.toml, env.json, metrics.jsonl, log.txt, checkpoints/,
LATEST, model/}; with --tokenizer also RUN/samples/, pictures of free-running validation. Several
folders are mixed: `--shards A B --weights 3 1`. Tars that are elsewhere come as a stream:
`--stream 'https://host/corpus/{file}'`, with manifest.json and codebook.safetensors in SHARDS. For
several processes: `torchrun --nproc_per_node 2 -m worldloom.pipelines train-dynamics ...`.
"""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg
from worldloom.common import ConfigError, TokenShards, say
from worldloom.dynamics import DynamicsConfig, DynamicsTrainingConfig, StreamConfig

if TYPE_CHECKING:
    from .dynamics_dry_run import DynamicsDryRun


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainDynamicsConfig:
    """Train a dynamics model on token shards; a stopped run continues.

    worldloom train-dynamics --shards runs/demo/shards --output runs/demo/dynamics

    worldloom train-dynamics --shards walks fights --weights 3 1 --output runs/both
    """

    shards: tuple[Path, ...]
    """Folder of token shards, as `worldloom tokenize` writes it, or several; nothing else is
    needed."""
    output: Path
    """Run directory; the model itself is in its folder model/."""
    weights: tuple[float, ...] = ()
    """How often each of several folders is drawn, in any unit; without, by their latent frames."""
    stream: Annotated[str | None, arg(metavar="SOURCE")] = None
    """Where the shards' tars are, if not in the folder: a path, https://HOST/{file} or
    pipe:COMMAND {file}; {file} becomes the name of each. A pipe is a command for your shell."""
    stream_lanes: int = 4
    """Tars read at once from a stream: a multiple of the processes, a divisor of the batch."""
    stream_buffer: int = 4096
    """Windows of a stream that are held back for shuffling."""
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None
    """The shards' tokenizer, named as `worldloom tokenize` takes it, if validation shall also draw
    pictures."""
    cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    dry_run: bool = False
    """Say what it would take (parameters, memory, codes, time) and stop."""
    training: DynamicsTrainingConfig = field(default_factory=DynamicsTrainingConfig)
    """How it is trained."""
    model: DynamicsConfig = field(default_factory=DynamicsConfig)
    """Its sizes and parts (docs/dynamics.md)."""

    def __post_init__(self) -> None:
        """Refuse a training of nothing."""
        if not self.shards:
            raise ConfigError("--shards: names no folder; name one that `worldloom tokenize` wrote")

    @property
    def streaming(self) -> StreamConfig | None:
        """How the tars come, if not from the folder."""
        if self.stream is None:
            return None
        return StreamConfig(
            url=self.stream, lanes=self.stream_lanes, buffer_windows=self.stream_buffer
        )


def train_dynamics(config: TrainDynamicsConfig) -> "Path | DynamicsDryRun | None":
    """Train the dynamics; return the model directory, or None in all processes but the main one."""
    stream = config.streaming
    shards = [TokenShards(path, tars_elsewhere=stream is not None) for path in config.shards]
    # Here and not above: `worldloom train-dynamics --help` must not wait for torch.
    from worldloom.dynamics import check_alike, train_dynamics_model

    check_alike(shards)
    if config.dry_run:
        from .dynamics_dry_run import dry_run

        return dry_run(shards, model=config.model, training=config.training, cpu=config.cpu)
    if stream is not None and stream.url.startswith("pipe:"):
        say(f"--stream runs a command in your shell for every shard: {stream.url[5:]}")
    # Of several processes only the main one draws and says what came of it.
    is_main = "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"
    draw = None
    if config.tokenizer is not None:
        from .dynamics_pictures import painter, tokenizer_of

        decoder = tokenizer_of(shards, config.tokenizer)  # what is refused is refused by all
        if is_main:
            draw = painter(
                shards,
                config.output / "samples",
                decoder=decoder,
                window_frames=config.training.window_frames,
                seed=config.training.seed,
                stream=stream,
            )
    model = train_dynamics_model(
        shards,
        config.output,
        model=config.model,
        training=config.training,
        weights=config.weights or None,
        stream=stream,
        cpu=config.cpu,
        on_validation=draw,
    )
    if not is_main:
        return None
    pictures = "" if draw is None else f"; look at the pictures in {config.output / 'samples'}"
    say(f"wrote {model}{pictures}")
    first = config.shards[0]
    beside = first.parent / "tokenizer" / "model"
    tokenizer = config.tokenizer or (beside if beside.is_dir() else "TOKENIZER")
    start = str(first) if stream is None else "EPISODES"  # shards to start from must be here
    words = ["worldloom", "generate", "--model", str(model), "--tokenizer", str(tokenizer),
             "--start", start, "--actions", "true",
             "--output", str(config.output.parent / "generated")]  # fmt: skip
    say(f"next: {shlex.join(words)}")
    return model
