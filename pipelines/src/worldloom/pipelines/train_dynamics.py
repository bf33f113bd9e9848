"""Token shards -> a dynamics model: given codes and actions, the next frame's codes.

    worldloom train-dynamics --shards runs/doom/shards --output runs/doom/dynamics

reads SHARDS alone and writes RUN/{config.toml, env.json, metrics.jsonl, log.txt, checkpoints/,
LATEST, model/}; with --tokenizer also RUN/samples/, pictures of free-running validation. Several
folders are mixed: `--shards A B --weights 3 1`. Tars that are elsewhere come as a stream:
`--stream 'https://host/corpus/{file}'`, with manifest.json and codebook.safetensors in SHARDS. For
several processes: `torchrun --nproc_per_node 2 -m worldloom.pipelines train-dynamics ...`.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.common import ConfigError, TokenShards, say
from worldloom.dynamics import DynamicsConfig, DynamicsTrainingConfig, StreamConfig

if TYPE_CHECKING:
    from worldloom.dynamics import DynamicsModel

    from .dry_run import DryRun


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
    stream: str | None = None
    """Where the shards' tars are, if not in the folder: a path, https://HOST/{file} or
    pipe:COMMAND {file}; {file} becomes the name of each. A pipe is a command for your shell."""
    stream_lanes: int = 4
    """Tars read at once from a stream: a multiple of the processes, a divisor of the batch."""
    stream_buffer: int = 4096
    """Windows of a stream that are held back for shuffling."""
    tokenizer: str | None = None
    """The shards' tokenizer, named as `worldloom tokenize` takes it, if validation shall also draw
    pictures."""
    cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    dry_run: bool = False
    """Say what it would take (parameters, tokens per update, checkpoint, memory) and stop."""
    training: DynamicsTrainingConfig = field(default_factory=DynamicsTrainingConfig)
    """How it is trained."""
    model: DynamicsConfig = field(default_factory=DynamicsConfig)
    """Its sizes."""

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


def train_dynamics(config: TrainDynamicsConfig) -> "Path | DryRun":
    """Train the dynamics; return the model directory."""
    stream = config.streaming
    shards = [TokenShards(path, tars_elsewhere=stream is not None) for path in config.shards]
    # Here and not above: `worldloom train-dynamics --help` must not wait for torch.
    from worldloom.dynamics import check_alike, train_dynamics_model

    check_alike(shards)
    if config.dry_run:
        return _dry_run(config, shards[0])
    if stream is not None and stream.url.startswith("pipe:"):
        say(f"--stream runs a command in your shell for every shard: {stream.url[5:]}")
    draw = None if config.tokenizer is None else _painter(config, shards, config.tokenizer)
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


def _painter(
    config: TrainDynamicsConfig, shards: Sequence[TokenShards], tokenizer_name: str
) -> Callable[["DynamicsModel", int], None]:
    """Return what draws true frames above generated ones, from held-out windows."""
    import torch
    from torchvision.io import encode_png
    from torchvision.utils import make_grid
    from worldloom.common import write_bytes
    from worldloom.dynamics import SamplingConfig, generate_codes, open_held_out
    from worldloom.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_name)
    each = -(-6 // len(shards))
    codes, slots = [], []
    for one in shards:
        tokenizer.spec.require(one.tokenizer, here=tokenizer_name, there=str(one.folder))
        windows = open_held_out(
            one, window_frames=config.training.window_frames, stream=config.streaming
        )
        batch = windows.batch(0, size=64, seed=config.training.seed)
        # Windows that are full come first: in others the last frames are padding.
        fullest = batch.valid_Bt.sum(1).argsort(descending=True, stable=True)[:each]
        codes.append(batch.codes_Bthw[fullest])
        slots.append(batch.slots_BTA[fullest])
    codes_Bthw, slots_BTA = torch.cat(codes), torch.cat(slots)
    prompt_frames = max(1, config.training.window_frames // 4)
    num_frames = shards[0].codes.pixel_frames(codes_Bthw.shape[1])

    def draw(model: "DynamicsModel", step: int) -> None:
        generated_Bthw = generate_codes(
            model,
            codes_Bthw[:, :prompt_frames],
            slots_BTA,
            seeds=range(len(codes_Bthw)),
            sampling=SamplingConfig(),
        ).cpu()
        pairs_BpTHWC = torch.stack(
            [
                tokenizer.decode(c, num_frames=num_frames).cpu()
                for c in (codes_Bthw, generated_Bthw)
            ],
            dim=1,
        )
        tiles_NCHW = pairs_BpTHWC.flatten(0, 2).movedim(-1, 1)
        grid = make_grid(tiles_NCHW, nrow=num_frames, padding=1, pad_value=128)
        path = config.output / "samples" / f"step-{step:08d}.png"
        write_bytes(path, bytes(encode_png(grid).numpy()))

    return draw


def _dry_run(config: TrainDynamicsConfig, shards: TokenShards) -> "DryRun":
    """Say what the training would take."""
    import torch
    from torch import Tensor
    from worldloom.dynamics import DynamicsModel, DynamicsSpec

    from .dry_run import estimate

    training, codes = config.training, shards.codes
    spec = DynamicsSpec(
        tokenizer=shards.tokenizer,
        actions=shards.actions,
        fps=shards.fps,
        frame_skip=shards.frame_skip,
    )
    dynamics = DynamicsModel(config.model, spec, shards.codebook_VZ()).train()
    t = training.window_frames

    def forward() -> Tensor:
        codes_Bthw = torch.zeros(1, *codes.codes_shape(t), dtype=torch.int64)
        steps = (t - 1) * codes.frames_per_latent
        slots_BTA = torch.zeros(1, steps, shards.actions.num_slots, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, training.bf16):
            logits_BfSV: Tensor = dynamics(codes_Bthw, slots_BTA)
        # The loss keeps their logarithms.
        return logits_BfSV.float().log_softmax(-1)

    return estimate(
        dynamics,
        forward,
        samples=training.batch_windows,
        items=training.batch_windows * (t - 1) * codes.cells * codes.num_levels,
        updates=training.num_steps,
        sample="window",
        item="predicted token",
    )
