"""How fast are the decoders, and what does guidance cost?

    python benchmarks/generate.py                          about 15 minutes on 2 cores
    python benchmarks/generate.py --grid 8 --updates 600   one grid, a model that knows more
    python benchmarks/generate.py --shards runs/demo/shards

For each grid a model of the demo's size (192 wide, 4 layers, 1024 codes) with order raster learns a
game for a few hundred updates: rooms of codes that scroll with two of four actions, a sprite that
moves with the others, and cells that flicker at random. With --shards it learns those. Then the
decoders go on from the same state with the same noise, frame by frame in turn, so they draw the
same codes ("same codes": the share of frames in which they did; where two codes tie, one may
differ, and from there on the worlds do). The context is how many frames the cache holds.

    decoders    raster; jacobi as it is by default; jacobi that draws all that is left; auto
    guidance    a frame guided by scale 2 against one that is not
    peer        one forward a cell through x-transformers' own Decoder of the same sizes, whose
                cache grows by concatenation, against raster; untrained, no logits, no noise

Milliseconds are of whole frames, with noise and sampling, without pixels. Tables go to stdout.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Report, arguments, spread
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsTrainingConfig,
    Rollout,
    SamplingConfig,
    Windows,
    train_dynamics_model,
)
from worldloom.dynamics.decoders import Auto, Decoder, Jacobi, Raster

ACTIONS = ActionSpec.discrete(["left", "right", "up", "down"])
SIZES = {"num_layers": 4, "dim": 192, "num_heads": 6, "num_meta_tokens": 16}
TINY = {"num_layers": 2, "dim": 32, "num_heads": 2, "num_meta_tokens": 4}
VOCABULARY, ROOMS, FLICKER = 1024, 4, 0.05


def game(grid: int, frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes_thw and slots_TA of a walk through rooms that all walks share."""
    rooms = np.random.default_rng(grid).integers(16, VOCABULARY, (ROOMS, grid, 3 * grid))
    rng = np.random.default_rng([seed, grid])
    room = rooms[rng.integers(ROOMS)]
    size = max(1, grid // 4)
    view, height = rng.integers(3 * grid), rng.integers(grid - size + 1)
    slots_TA, codes = rng.integers(0, 4, (frames - 1, 1)), []
    # People hold their keys: an action stays three times out of four.
    for step in range(1, frames - 1):
        if rng.random() < 0.75:
            slots_TA[step] = slots_TA[step - 1]
    for frame in range(frames):
        if frame:
            action = int(slots_TA[frame - 1, 0])
            view += {0: -1, 1: 1}.get(action, 0)
            height = np.clip(height + {2: -1, 3: 1}.get(action, 0), 0, grid - size)
        codes_hw = np.roll(room, -view, axis=1)[:, :grid].copy()
        flickers = rng.random(codes_hw.shape) < FLICKER
        codes_hw[flickers] = rng.integers(0, 4, int(flickers.sum()))
        middle = (grid - size) // 2
        codes_hw[height : height + size, middle : middle + size] = 4
        codes.append(codes_hw)
    return np.stack(codes), slots_TA


def write_game(folder: Path, grid: int, *, episodes: int, seed: int) -> TokenShards:
    """Write shards of walks."""
    folder.mkdir(parents=True)
    codes = CodeSpec(vocab_size=VOCABULARY, grid_height=grid, grid_width=grid, code_dim=16)
    walks = [game(grid, 40, 1000 * seed + number) for number in range(episodes)]
    rows = [
        TokenEpisode(
            key=f"walk{number}",
            codes_thw=codes_thw,
            slots_TA=slots_TA,
            num_frames=len(codes_thw),
            split="validation" if number >= episodes - 4 else "train",
        )
        for number, (codes_thw, slots_TA) in enumerate(walks)
    ]
    record = write_shard(folder, 0, rows, codes=codes, actions=ACTIONS)
    write_manifest(
        folder,
        [record],
        tokenizer=TokenizerSpec(
            name="game", codes=codes, height=8 * grid, width=8 * grid, resize="exact", fps=10.0,
            frame_skip=1, compute_dtype="float32", fingerprint="0" * 64,
        ),
        actions=ACTIONS,
        codebook_VZ=np.random.default_rng(0).normal(size=(VOCABULARY, 16)).astype("f4"),
        fps=10.0,
        frame_skip=1,
        metrics={},
        source={"game": "rooms"},
    )  # fmt: skip
    return TokenShards(folder)


def learn(shards: TokenShards, run: Path, *, order: str, asked: Any) -> DynamicsModel:
    """Train a model of the demo's size; large grids get fewer windows an update."""
    codes = shards.tokenizer.codes
    cells = codes.grid_height * codes.grid_width
    folder = train_dynamics_model(
        shards,
        run,
        model=DynamicsConfig(order=order, context_frames=8, **(TINY if asked.quick else SIZES)),
        training=DynamicsTrainingConfig(
            num_steps=asked.updates,
            batch_windows=max(2, min(16, 1024 // cells)),
            window_frames=8,
            learning_rate=1e-3,
            warmup_steps=min(20, asked.updates - 1),
            validate_every=asked.updates,
            checkpoint_every=asked.updates,
            log_every=max(1, asked.updates // 10),
            seed=asked.seed,
        ),
    )
    return DynamicsModel.from_pretrained(folder)


def with_context(model: DynamicsModel, frames: int) -> DynamicsModel:
    """Return the same weights with another context."""
    codebook = model.state_dict()["before.vectors"][:-1].numpy()
    other = DynamicsModel(replace(model.config, context_frames=frames), model.spec, codebook)
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(requires_grad=False)


class Race:
    """Rollouts from one state, which make every frame in turn; each is timed."""

    def __init__(
        self,
        model: DynamicsModel,
        start: Rollout,
        ways: Mapping[str, tuple[SamplingConfig, Decoder]],
    ) -> None:
        self.rollouts, self.seconds, self.forwards, self.same = {}, {}, {}, {}
        self._model = model
        for name, (sampling, decoder) in ways.items():
            rollout = start.fork(1, seeds=[0])
            rollout.sampling = sampling
            rollout._decoder = decoder
            self.rollouts[name] = rollout
            self.seconds[name], self.forwards[name], self.same[name] = [], [], []

    def run(self, slots_TA: torch.Tensor, *, warm_up: int) -> None:
        """Make a frame for every action; the first few are not counted."""
        for step in range(len(slots_TA)):
            codes = []
            for name, rollout in self.rollouts.items():
                began = time.perf_counter()
                codes.append(rollout.step(slots_TA[step][None, None]))
                took = time.perf_counter() - began
                if step >= warm_up:
                    self.seconds[name].append(took)
                    self.forwards[name].append(rollout.forwards)
                    self.same[name].append(float(torch.equal(codes[0], codes[-1])))

    def rows(self, first: str) -> Iterator[dict[str, Any]]:
        """Yield a row a way; `first` is what the others are compared with."""
        base = float(np.median(self.seconds[first]))
        for name, seconds in self.seconds.items():
            p50, p95 = (float(value) * 1e3 for value in np.percentile(seconds, [50, 95]))
            yield {
                "way": name,
                "frames/s": 1e3 / p50,
                "p50 ms": p50,
                "p95 ms": p95,
                "forwards/frame": float(np.mean(self.forwards[name])),
                f"speed of {first}": base / (p50 / 1e3),
                "same codes": float(np.mean(self.same[name])),
                "state MB": self.rollouts[name].size_bytes / 1e6,
            }


def prompt(shards: TokenShards, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes_Bthw and slots_BTA of a held-out window."""
    batch = Windows(shards, "validation", window_frames=frames).batch(0, size=1, seed=0)
    return batch.codes_Bthw, batch.slots_BTA


def started(model: DynamicsModel, shards: TokenShards, sampling: SamplingConfig) -> Rollout:
    """Return a rollout whose cache is full."""
    codes_Bthw, slots_BTA = prompt(shards, 8)
    rollout = Rollout(model, codes_Bthw, slots_BTA, seeds=[0], sampling=sampling)
    for step in range(model.config.context_frames - 8):
        rollout.step(slots_BTA[:, step % 7 : step % 7 + 1])
    return rollout


def growing_cache(model: DynamicsModel, repeats: int) -> list[float]:
    """Return seconds of frames of as many one-cell forwards with x-transformers' own cache."""
    from x_transformers import Decoder as Peer

    config, cells = model.config, model.grid.cells
    peer = Peer(
        dim=config.dim, depth=config.num_layers, heads=config.num_heads,
        attn_dim_head=config.dim // config.num_heads, rotary_pos_emb=True, use_rmsnorm=True,
        ff_glu=True, ff_swish=True, ff_mult=config.ff_mult, ff_no_bias=True, attn_flash=True,
    ).eval()  # fmt: skip
    seconds = []
    past = (config.context_frames - 1) * cells
    tokens_BLD = torch.randn(1, past + cells, config.dim)
    with torch.inference_mode():
        _, full = peer(tokens_BLD[:, :past], return_hiddens=True)
        for _ in range(repeats):
            cache, began = full, time.perf_counter()
            for cell in range(cells):
                _, cache = peer(tokens_BLD[:, : past + cell + 1], cache=cache, return_hiddens=True)
            seconds.append(time.perf_counter() - began)
    return seconds


def decoders(sampling: SamplingConfig) -> dict[str, tuple[SamplingConfig, Decoder]]:
    """Return what is compared."""
    return {
        "raster": (sampling, Raster()),
        "jacobi": (sampling, Jacobi()),
        "jacobi, all that is left": (sampling, Jacobi(reach=inf)),
        "auto": (sampling, Auto()),
    }


def guided(sampling: SamplingConfig) -> dict[str, tuple[SamplingConfig, Decoder]]:
    """Return a rollout without and with guidance, drawn by the default decoder."""
    strong = replace(sampling, guidance_scale=2.0)
    return {"off": (sampling, Jacobi()), "scale 2": (strong, Jacobi())}


def main() -> None:
    """Train, race, print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0, help="of game, training and noise")
    parser.add_argument("--grid", type=int, action="append", help="4, 8 or 16; several times")
    parser.add_argument("--updates", type=int, default=300, help="of training, a model")
    parser.add_argument("--frames", type=int, default=40, help="timed, a way")
    parser.add_argument("--temperature", type=float, action="append", help="1.0; several times")
    parser.add_argument("--shards", type=Path, help="learn these codes and no game")
    asked = parser.parse_args()
    if asked.quick:
        asked.grid, asked.updates, asked.frames = [4], 4, 16
    report = Report("generate", quick=asked.quick, packages=("x-transformers",))
    with tempfile.TemporaryDirectory() as folder:
        for grid in [0] if asked.shards else asked.grid or [4, 8, 16]:
            here = Path(folder) / str(grid)
            shards = (
                TokenShards(asked.shards)
                if asked.shards
                else write_game(
                    here / "shards", grid, episodes=12 if asked.quick else 200, seed=asked.seed
                )
            )
            compare(report, shards, here, asked)
    report.write(asked.json)


def compare(report: Report, shards: TokenShards, folder: Path, asked: Any) -> None:
    """Print the tables of one grid."""
    codes = shards.tokenizer.codes
    grid = f"{codes.grid_height}x{codes.grid_width}"
    settings = {"seed": asked.seed, "updates": asked.updates, "frames": asked.frames, "batch": 1}
    models = {
        order: learn(shards, folder / order, order=order, asked=asked)
        for order in ("raster", "row", "frame")
    }
    _, slots_BTA = prompt(shards, 8)
    warm_up = 13  # frames: auto has measured by then
    slots_TA = slots_BTA[0].repeat(1 + (asked.frames + warm_up) // 7, 1)[: asked.frames + warm_up]
    for temperature in asked.temperature or [1.0]:
        sampling = SamplingConfig(temperature=temperature)
        for order, context in (("raster", 8), ("raster", 16), ("row", 8)):
            model = with_context(models[order], context)
            race = Race(model, started(model, shards, sampling), decoders(sampling))
            race.run(slots_TA, warm_up=warm_up)
            here = {**settings, "temperature": temperature, "context frames": context}
            title = f"decoders, {grid}, order {order}, context {context}, T {temperature}"
            report.table(title, list(race.rows("raster")), settings=here)
        rows: list[dict[str, Any]] = []
        for order in ("frame", "raster"):
            model = models[order]
            race = Race(model, started(model, shards, sampling), guided(sampling))
            race.run(slots_TA, warm_up=warm_up)
            off, on = race.rows("off")
            rows.append({
                "order": order,
                "off ms": off["p50 ms"],
                "scale 2 ms": on["p50 ms"],
                "cost": on["p50 ms"] / off["p50 ms"],
                "cost a forward": (on["p50 ms"] / on["forwards/frame"])
                / (off["p50 ms"] / off["forwards/frame"]),
            })  # fmt: skip
        report.table(f"guidance, {grid}, T {temperature}", rows, settings=settings)
    peers(report, models["raster"], shards, title=f"peer, {grid}", settings=settings)


def peers(
    report: Report,
    model: DynamicsModel,
    shards: TokenShards,
    /,
    *,
    title: str,
    settings: Mapping[str, Any],
) -> None:
    """Print raster against a cache that grows, in turn."""
    sampling = SamplingConfig(decoder="raster")
    rollout = started(model, shards, sampling)
    _, slots_BTA = prompt(shards, 8)
    ours: list[float] = []
    theirs: list[float] = []
    for step in range(5):
        began = time.perf_counter()
        rollout.step(slots_BTA[:, step : step + 1])
        ours.append(time.perf_counter() - began)
        theirs += growing_cache(model, 1)
    rows: Sequence[Mapping[str, Any]] = [
        {"cache": "preallocated, with noise and sampling", "ms": milliseconds(ours)},
        {"cache": "x-transformers' own, tokens alone", "ms": milliseconds(theirs)},
        {"cache": "ratio", "ms": float(np.median(theirs) / np.median(ours))},
    ]
    report.table(title, rows, settings=settings)


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest; the first warms up."""
    return spread([1e3 * value for value in seconds[1:]])


if __name__ == "__main__":
    main()
