"""What corrupting the input codes does against drift: frames that get worse the longer it runs.

    python benchmarks/drift.py --run runs/demo --json drift.json

Trains a small model on the token shards of a demo's folder (`make demo`) with each share of
corruption and each seed, everything else the same, and rolls it out from moments of the held-out
episodes under their true actions, much longer than its context. Corruption replaces a share of the
input codes at random; the share grows along the window, from 0 to at most this. Stated are

    dB at N            PSNR of the N-th generated frame to the true one
    drift dB/frame     slope of the straight line through the PSNR of every generated frame: below 0
                       by what a further frame costs
    codes right at N   share of the codes of the N-th generated frame that are the true ones
    cross-entropy      nats a code given the true past, which corruption cannot better

as the median over the seeds with the least and the greatest. A model whose first frames are bad
already has little left to lose: read the slope beside the first frame. The same moments and seeds
for all; beside the table stands what repeating the last frame scores.

Every run is written to the --json file when it is done. Tables go to stdout, progress to stderr.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Report, arguments, spread
from worldloom.common import (
    ActionSpec,
    Episodes,
    EpisodesSpec,
    EpisodeWriter,
    TokenShards,
    say,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsTrainingConfig,
    SamplingConfig,
    generate_codes,
    train_dynamics_model,
)
from worldloom.pipelines import measures
from worldloom.pipelines.encoding import batches
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.pipelines.world import World
from worldloom.tokenizer import load_tokenizer
from worldloom.tokenizer.patch import PatchConfig, PatchTokenizer

MODEL = DynamicsConfig(num_layers=4, dim=128, num_heads=4, context_frames=8)
TRAINING = DynamicsTrainingConfig(
    batch_windows=16,
    window_frames=MODEL.context_frames + 1,
    warmup_steps=20,
    validate_every=1 << 30,  # at the end, once, whatever this says
    checkpoint_every=1 << 30,
    log_every=50,
)
PROMPT_FRAMES = 4


def measure(  # noqa: PLR0913 - all that one run depends on
    run: Path, corruption: float, *, model: DynamicsConfig, training: DynamicsTrainingConfig,
    plan: measures.Plan, held_out: Sequence[measures.HeldOut], rollouts: int,
) -> dict[str, Any]:  # fmt: skip
    """Train with a share of corruption and return how the model holds out."""
    folder = Path(tempfile.mkdtemp(prefix="worldloom-"))
    try:
        trained = train_dynamics_model(
            TokenShards(run / "shards"),
            folder / "run",
            model=model,
            training=replace(training, corruption=corruption),
            cpu=True,
        )
        world = World.from_pretrained(
            trained, run / "tokenizer" / "model", sampling=SamplingConfig()
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    frames = plan.prompt_frames + plan.horizon
    starts = measures.find_starts(
        held_out, frames=frames, count=rollouts, world=world, seed=plan.seed
    )
    numbers = measures.score(measures.roll_out(world, starts, plan), plan)
    return {
        "per_frame_db": numbers["per_frame"]["model_db"],
        "copy_db": numbers["per_frame"]["copy_db"],
        "drift_db_per_frame": numbers["drift_db_per_frame"],
        "right": codes_right(world, starts, plan),
        **measures.given_the_past(world, held_out, plan.batch),
    }


def codes_right(
    world: World, starts: Sequence[measures.RolloutStart], plan: measures.Plan
) -> list[float]:
    """Return the share of right codes in every latent frame generated from some starts."""
    r, given, frames = world.steps_per_latent, plan.prompt_frames, plan.prompt_frames + plan.horizon
    right_Bt = []
    for rows in batches(starts, plan.batch):
        codes = [s.episode.codes_thw[s.first : s.first + frames] for s in rows]
        slots = [s.episode.slots_TA[s.first * r : (s.first + frames - 1) * r] for s in rows]
        codes_Bthw = torch.stack(codes)
        generated_Bthw = generate_codes(
            world.model,
            codes_Bthw[:, :given],
            torch.from_numpy(np.stack(slots)),
            seeds=range(len(rows)),
            sampling=world.sampling,
        ).cpu()
        right_Bt.append((generated_Bthw == codes_Bthw).flatten(2).float().mean(2)[:, given:])
    return torch.cat(right_Bt).mean(0).tolist()


def write_walks(run: Path, *, episodes: int, frames: int) -> None:
    """Write episodes of a square that is pushed, a tokenizer and shards: enough to see it run."""
    spec = EpisodesSpec(
        actions=ActionSpec.discrete(["stay", "left", "right"]),
        height=16, width=16, fps=10.0, frame_skip=1, source={"env": "square"},
    )  # fmt: skip
    spec.write(run / "episodes")
    for number in range(episodes):
        pushes = np.random.default_rng(number).integers(0, 3, frames - 1)
        columns = 6 + np.cumsum([0, *np.array([0, -2, 2])[pushes]])
        with EpisodeWriter(run / "episodes", f"walk-{number:04d}", spec=spec) as writer:
            for column in np.clip(columns, 0, 12):
                frame = np.full((16, 16, 3), 30, np.uint8)
                frame[4:8, column : column + 4] = (240, 200, 60)
                writer.append(frame)
            writer.finish(pushes)
    tokenizer = PatchTokenizer(PatchConfig(patch=4, height=16, width=16))
    tokenizer.save(run / "tokenizer" / "model", card="of a benchmark")
    tokenize(
        TokenizeConfig(
            episodes=run / "episodes",
            tokenizer=str(run / "tokenizer" / "model"),
            output=run / "shards",
            device="cpu",
            workers=1,
        )
    )


def summary(runs: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row a share of corruption."""
    rows = []
    for share in dict.fromkeys(run["corruption"] for run in runs):
        same = [run for run in runs if run["corruption"] == share]
        row: dict[str, Any] = {"corruption": share}
        for place in places:
            row[f"dB at {place}"] = spread([run["per_frame_db"][place - 1] for run in same])
        row["drift dB/frame"] = spread([run["drift_db_per_frame"] for run in same])
        for place in places:
            row[f"codes right at {place}"] = spread([run["right"][place - 1] for run in same])
        row["cross-entropy"] = spread([run["cross_entropy"] for run in same])
        rows.append(row)
    return rows


def main() -> None:
    """Train and roll out with every share and seed; print the table."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a demo's folder")
    parser.add_argument("--corruption", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--horizon", type=int, default=32, help="latent frames generated")
    parser.add_argument("--rollouts", type=int, default=64)
    asked = parser.parse_args()
    if asked.run is None and not asked.quick:
        parser.error("--run: name a demo's folder, such as runs/demo (`make demo`)")
    torch.set_num_threads(1)
    report = Report("drift", quick=asked.quick, packages=("x-transformers",))
    model, training = MODEL, replace(TRAINING, num_steps=asked.updates)
    if asked.quick:
        asked.corruption, asked.seeds, asked.horizon, asked.rollouts = [0.0, 0.3], [0], 8, 2
        model = replace(model, num_layers=1, dim=24, num_heads=2)
        training = replace(training, num_steps=2, batch_windows=2, log_every=1)
    with tempfile.TemporaryDirectory(prefix="worldloom-") as folder:
        run = asked.run
        if run is None:
            run = Path(folder) / "run"
            write_walks(run, episodes=10, frames=24)
        episodes = Episodes(run / "episodes")
        tokenizer = load_tokenizer(run / "tokenizer" / "model")
        held_out = measures.read_held_out(episodes, episodes.split("validation"), tokenizer)
        plan = measures.Plan(prompt_frames=PROMPT_FRAMES, horizon=asked.horizon, batch=16, seed=0)
        runs: list[dict[str, Any]] = []
        pairs = [(share, seed) for seed in asked.seeds for share in asked.corruption]
        settings = {
            "updates": training.num_steps,
            "windows": training.batch_windows,
            "seeds": asked.seeds,
            "prompt_frames": plan.prompt_frames,
            "horizon": plan.horizon,
            "rollouts": asked.rollouts,
        }
        for number, (share, seed) in enumerate(pairs, 1):
            say(f"drift: {number} of {len(pairs)}: corruption {share}, seed {seed}")
            found = measure(
                run, share, model=model, training=replace(training, seed=seed), plan=plan,
                held_out=held_out, rollouts=asked.rollouts,
            )  # fmt: skip
            runs.append({"corruption": share, "seed": seed, **found})
            report.keep("runs", runs, settings=settings)  # with every frame, should it be stopped
            report.write(asked.json)
    places = [n for n in (1, 4, 8, 16, 32) if n <= plan.horizon]
    shown = ("corruption", "seed", "drift_db_per_frame", "cross_entropy")
    report.table("runs", [{name: one[name] for name in shown} for one in runs], settings=settings)
    copied = {f"copied dB at {n}": runs[0]["copy_db"][n - 1] for n in places}
    report.table("drift", summary(runs, places), settings=settings | copied)
    report.write(asked.json)


if __name__ == "__main__":
    main()
