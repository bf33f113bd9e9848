"""First frames and actions -> video, true next to generated.

    model, tokenizer, start, actions  ->  OUTPUT/{generated.mp4, generated.gif, contact-sheet.png,
                                          codes.npz, session.json}

session.json and codes.npz hold everything that was decided: the same command gives the same codes.
"""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from worldloom.common import (
    ActionSpec,
    FormatError,
    Frames,
    SlotArray,
    atomic_folder,
    numpy_stream,
    progress,
    say,
    to_json,
)
from worldloom.dynamics import SamplingConfig

from .action_sources import random_actions, sticky_actions, written_actions
from .checks import require_at_least, require_own_output

if TYPE_CHECKING:
    from .starts import Start
    from .world import World

SESSION_SCHEMA = "worldloom.session/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Generate video: start from real frames, press actions, watch.

    worldloom generate --model runs/demo/dynamics/model --tokenizer runs/demo/tokenizer/model
    --start runs/demo/shards --actions "MOVE_RIGHT*12,ATTACK*2" --output out
    """

    actions: str
    """What to press: words such as MOVE_RIGHT*12,ATTACK*2 (separated by ; where an action has
    several numbers, as in 0.5,0*12;0,0*4); a file of them (.json, .npy of slots, .txt); `true` for
    those of the episode, which draws the true frames beside; or `random` or `sticky`."""
    model: Path
    """Model directory that train-dynamics wrote."""
    tokenizer: str
    """The tokenizer that wrote the model's shards, named as `worldloom tokenize` takes it."""
    start: Path
    """Where it starts: a folder of token shards, a folder of episodes, or a picture."""
    output: Path
    """Folder for the video, the pictures and the codes. One that generate wrote is replaced."""
    episode: str = "0"
    """Which episode of --start: its key, or its number among the held-out ones."""
    start_frame: int = 0
    """Frame of the episode where the prompt begins."""
    prompt_frames: int = 4
    """Latent frames given; the rest is generated. A picture is one."""
    horizon: int = 32
    """Frames to generate where the actions have no end of their own (true, random, sticky)."""
    seed: int = 0
    """Of all that is drawn; sample k uses seed + k. The same seed gives the same codes."""
    num_samples: int = 1
    """How many futures of the same start and actions."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How codes are drawn."""
    scale: int = 4
    """Every pixel becomes a square of this many pixels a side."""
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one), cpu, cuda, mps."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to do."""
        require_at_least(1, self, "prompt_frames", "horizon", "num_samples", "scale")
        require_at_least(0, self, "start_frame")


def generate(config: GenerateConfig) -> Path:
    """Generate video from a start and actions; return the folder with what came out."""
    from .devices import choose_device
    from .starts import Moment, read_start
    from .world import World

    require_own_output(config.output, sign="session.json", command="generate")
    world = World.from_pretrained(
        config.model,
        config.tokenizer,
        sampling=config.sampling,
        device=choose_device(config.device),
    )
    moment = Moment(
        episode=config.episode,
        start_frame=config.start_frame,
        prompt_frames=config.prompt_frames,
    )
    start = read_start(config.start, world, moment)
    slots_TA = _actions(config, world.model.spec.actions, start)
    seeds = [config.seed + sample for sample in range(config.num_samples)]
    samples, codes, seconds = [], [], 0.0
    for seed in progress(seeds, "generating"):
        frames_THWC, codes_thw, took = _roll(world, start, slots_TA, seed)
        samples.append(frames_THWC)
        codes.append(codes_thw)
        seconds += took
    session = _session(config, world, start, slots_TA, seeds)
    with atomic_folder(config.output) as folder:
        _draw(folder, config, start, session, samples)
        np.savez(folder / "codes.npz", codes=np.stack(codes), actions=slots_TA)
        (folder / "session.json").write_text(to_json(session))
    frames = len(slots_TA) * len(seeds)
    say(
        f"generated {frames} frames from {start.source} in {seconds:.1f} s "
        f"({frames / max(seconds, 1e-9):.1f} frames/s, decoded); "
        f"look at {config.output / 'generated.gif'}"
    )
    say(f"next: {shlex.join(_another(config))}")
    return config.output


def _another(config: GenerateConfig) -> list[str]:
    """Return the command for another future of the same start: other actions, or another seed."""
    words = ["worldloom", "generate", "--model", str(config.model), "--tokenizer",
             config.tokenizer, "--start", str(config.start)]  # fmt: skip
    for name, usual in (("episode", "0"), ("start_frame", 0), ("prompt_frames", 4)):
        value = getattr(config, name)
        if value != usual:
            words += ["--" + name.replace("_", "-"), str(value)]
    if config.actions in ("random", "sticky"):
        seed = config.seed + config.num_samples
        words += ["--actions", config.actions, "--seed", str(seed)]
        return [*words, "--output", f"{config.output}-seed-{seed}"]
    return [*words, "--actions", "sticky", "--output", f"{config.output}-sticky"]


def _actions(config: GenerateConfig, spec: ActionSpec, start: "Start") -> SlotArray:
    """Return the slots of every step to generate."""
    if config.actions == "true":
        slots_TA = start.true_slots_TA[: config.horizon]
        if len(slots_TA) == 0:
            raise FormatError(
                f"{config.start}: no action is known after {start.source} and its prompt, so "
                "`--actions true` has none to take; start earlier or in another --episode, or "
                "write some"
            )
        return slots_TA
    if config.actions in ("random", "sticky"):
        draw = random_actions if config.actions == "random" else sticky_actions
        return draw(spec, config.horizon, rng=numpy_stream(config.seed, "generate-actions"))
    return written_actions(config.actions, spec=spec)


def _roll(
    world: "World", start: "Start", slots_TA: SlotArray, seed: int
) -> tuple[Frames, np.ndarray[Any, Any], float]:
    """Return frames_THWC and codes_thw of prompt and future, and the seconds the future took."""
    r = world.steps_per_latent
    # The last latent frame covers r steps, so the last action is held until they are full.
    missing = -len(slots_TA) % r
    held_TA = np.concatenate([slots_TA, np.repeat(slots_TA[-1:], missing, axis=0)])
    frames = [world.reset(start.codes_thw, start.slots_TA, seed=seed)]
    prompt_length = len(frames[0])
    codes = list(start.codes_thw)
    began = time.perf_counter()
    for step in range(0, len(held_TA), r):
        frames_rHWC, codes_hw = world.step(held_TA[step : step + r])
        frames.append(frames_rHWC)
        codes.append(codes_hw)
    seconds = time.perf_counter() - began
    codes_thw = np.stack([frame.numpy() for frame in codes])
    return np.concatenate(frames)[: prompt_length + len(slots_TA)], codes_thw, seconds


def _session(
    config: GenerateConfig,
    world: "World",
    start: "Start",
    slots_TA: SlotArray,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Return everything that was decided, as JSON values."""
    spec = world.model.spec
    return {
        "schema": SESSION_SCHEMA,
        "model": str(config.model),
        "tokenizer": spec.tokenizer.fingerprint,
        "start": start.source,
        "prompt_frames": len(start.codes_thw),
        "prompt_actions": start.slots_TA.tolist(),
        "actions": slots_TA.tolist(),
        "action_names": spec.actions.describe(slots_TA),
        "seeds": list(seeds),
        "sampling": asdict(config.sampling),
        "fps": spec.fps,
    }


def _draw(
    folder: Path,
    config: GenerateConfig,
    start: "Start",
    session: Mapping[str, Any],
    samples: Sequence[Frames],
) -> None:
    """Write generated.mp4, generated.gif and contact-sheet.png."""
    from .pictures import Strip, draw_movie, draw_sheet, encode_gif, encode_mp4, encode_png

    length, names = len(samples[0]), session["action_names"]
    labels = ["given"] * (length - len(names)) + names
    many = len(samples) > 1
    strips = [
        Strip(title=f"seed {config.seed + k}" if many else "generated", frames_THWC=frames)
        for k, frames in enumerate(samples)
    ]
    if config.actions == "true" and start.true_frames_THWC is not None:
        strips.insert(0, Strip(title="true", frames_THWC=start.true_frames_THWC[:length]))
    first = Strip(title=strips[0].title, frames_THWC=strips[0].frames_THWC, labels=labels)
    movie = draw_movie(strips, scale=config.scale, captions=labels)
    sheet = draw_sheet([first, *strips[1:]], scale=max(1, config.scale // 2))
    fps = session["fps"] or 10.0
    (folder / "generated.mp4").write_bytes(encode_mp4(movie, fps=fps))
    (folder / "generated.gif").write_bytes(encode_gif(movie, fps=fps))
    (folder / "contact-sheet.png").write_bytes(encode_png(sheet))
