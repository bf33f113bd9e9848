"""How fast episodes become codes, and which quantizer keeps most of a game.

    python benchmarks/tokenizer.py                       both, in about 15 minutes on 2 cores
    python benchmarks/tokenizer.py --only throughput     the first alone

throughput: frames per second of what a worker of `worldloom tokenize` does (reading episodes,
resizing, encoding, writing shards; not measuring the reconstruction) against a bare forward pass of
the same encoder and quantizer, at the same batch, on frames that are in memory as float32 already.
Both take turns in one process, after a warm-up; stated is the median of the turns' ratios, of
seconds and of processor time: the latter is what would be left if nothing overlapped, and hardly
depends on what else the machine does.

quantizers: tokenizers of equal size, alike but for the quantizer, trained for equally many updates
on episodes of Pong (a ball of 2 pixels), one after another and then again with the next seed;
measured on held-out episodes. They run on one thread, and s/update is processor time, which other
processes hardly disturb.

Both compute with one thread, as a worker on a CPU does; what overlaps does so only with a core to
spare. On a machine that is busy otherwise, the numbers mean little.

Both record what they need. Tables go to stdout, progress to stderr.
"""

import shutil
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch
from einops import rearrange
from report import Report, arguments, spread
from worldloom.common import Episodes, say
from worldloom.pipelines.encoding import EpisodeFrames, encode_videos, reconstructed_clips
from worldloom.pipelines.record import RecordConfig, record
from worldloom.pipelines.tokenize import keep_plan
from worldloom.pipelines.units import TokenizeJob, UnitWorker, make_plan, units_of
from worldloom.tokenizer import (
    ConvTokenizer,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
    Trained,
    to_video,
    train_conv_tokenizer,
)
from worldloom.tokenizer.metrics import (
    count_codes,
    decibels,
    moving_pixels,
    small_objects,
    squared_error,
)

GAME = "ALE/Pong-v5"

# Those of the demo: 64x64 frames, 8x8 codes of 1024.
MODEL = TokenizerConfig(
    height=64,
    width=64,
    patch=4,
    widths=(64, 128, 192),
    num_blocks=(1, 2, 2),
    quantizer=QuantizerConfig(vocab_size=1024, code_dim=16),
)

# About as many bits a cell as the demo's; one row has twice as many, to tell levels from bits.
QUANTIZERS = {
    "vq": QuantizerConfig(vocab_size=1024, code_dim=16),
    "vq cosine": QuantizerConfig(vocab_size=1024, code_dim=16, cosine=True),
    "fsq 8x5x5x5": QuantizerConfig(kind="fsq", fsq_levels=(8, 5, 5, 5)),
    "lfq": QuantizerConfig(kind="lfq", vocab_size=1024),
    "lfq spherical": QuantizerConfig(kind="lfq", vocab_size=1024, spherical=True),
    "residual 2x32": QuantizerConfig(kind="residual", vocab_size=32, code_dim=16),
    "residual 2x1024": QuantizerConfig(kind="residual", vocab_size=1024, code_dim=16),
}
SMALL = TokenizerConfig(height=64, width=64, patch=4, widths=(24, 48), num_blocks=(1, 1))
TRAINING = TokenizerTrainingConfig(
    num_steps=200,
    batch_clips=2,
    clip_frames=8,
    warmup_steps=20,
    checkpoint_every=100_000,
    sample_every=100_000,
)


def main() -> None:
    """Measure what was asked for."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", choices=("throughput", "quantizers"), help="leave out the other")
    parser.add_argument("--turns", type=int, default=7, help="of throughput (default 7)")
    parser.add_argument("--frames", type=int, default=192, help="of an episode (default 192)")
    parser.add_argument("--seeds", type=int, default=3, help="of the quantizers (default 3)")
    parser.add_argument(
        "--updates", type=int, default=TRAINING.num_steps, help="of each (default %(default)s)"
    )
    options = parser.parse_args()
    report = Report(
        "tokenizer", quick=options.quick, packages=("vector-quantize-pytorch", "ale-py")
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "quantizers":
            throughput(report, Path(folder), options.quick, options.turns, options.frames)
        if options.only != "throughput":
            quantizers(
                report,
                Path(folder),
                options.quick,
                options.seeds,
                3 if options.quick else options.updates,
            )
    report.write(options.json)


def throughput(report: Report, folder: Path, quick: bool, turns: int, frames: int) -> None:
    """Compare the pipeline with the network alone, on frames that fit and on frames to resize."""
    torch.set_num_threads(1)
    streams, frames = (2, 20) if quick else (16, frames)
    model = replace(MODEL, widths=(8, 16, 16), num_blocks=(1, 1, 1)) if quick else MODEL
    rows = []
    for height, width in ((64, 64), (120, 160)):
        episodes = recorded(
            folder / f"{height}x{width}", streams * (1 if quick else 2), frames, height, width
        )
        tokenizer = ConvTokenizer(
            replace(model, resize="stretch"),
            trained=Trained(fps=episodes.spec.fps, frame_skip=episodes.spec.frame_skip),
        ).eval()
        groups = in_memory(episodes, tokenizer, streams)
        count = sum(len(group) * len(group[0]) for group in groups)
        took: dict[str, list[float]] = {"bare": [], "tokenize": []}
        processor: dict[str, list[float]] = {"bare": [], "tokenize": []}
        for turn in range(-1, 1 if quick else turns):
            say(f"throughput, {height}x{width}: turn {turn + 1} of {turns}")
            for name in took:
                started, before = time.perf_counter(), time.process_time()
                if name == "bare":
                    bare(tokenizer, groups)
                else:
                    output = folder / "shards"
                    encode(tokenizer, episodes, output, streams)
                if turn >= 0:  # the first warms up caches, allocator and clock
                    took[name].append(time.perf_counter() - started)
                    processor[name].append(time.process_time() - before)
            shutil.rmtree(output)
        rows.append(
            {
                "episodes": f"{height}x{width}",
                "bare forward, frames/s": spread([count / seconds for seconds in took["bare"]]),
                "tokenize, frames/s": spread([count / seconds for seconds in took["tokenize"]]),
                "ratio": ratios(took),
                "of processor time": ratios(processor),
            }
        )
    settings = {
        "streams": streams,
        "frames": count,
        "turns": len(took["bare"]),
        "widths": model.widths,
        "to": "64x64",
        "seed": 0,
    }
    report.table("throughput", rows, settings=settings)


def encode(tokenizer: ConvTokenizer, episodes: Episodes, output: Path, streams: int) -> None:
    """Do what a worker does for every shard of `streams` episodes."""
    sizes = {"shard_episodes": streams, "batch_episodes": streams}
    plan = make_plan(episodes, tokenizer, **sizes)
    keep_plan(output, plan)
    job = TokenizeJob(
        episodes=episodes.folder, tokenizer="this one", output=output, device="cpu", threads=1,
        skip_bad=0, plan=plan, measure=False, **sizes,
    )  # fmt: skip
    units = range(len(units_of(episodes.keys, streams)))
    with closing(UnitWorker(job, episodes, tokenizer)) as worker:
        for index, following in zip_longest(units, units[1:]):
            worker.answer(index, following=following)


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return how fast tokenize is for a bare forward's 1, turn by turn."""
    pairs = zip(seconds["bare"], seconds["tokenize"], strict=True)
    return spread([bare / tokenize for bare, tokenize in pairs])


def recorded(folder: Path, episodes: int, frames: int, height: int, width: int) -> Episodes:
    """Record the game."""
    config = RecordConfig(
        env=GAME,
        output=folder,
        num_episodes=episodes,
        height=height,
        width=width,
        resize="stretch",
        max_frames=frames,
        workers=2,
    )
    return Episodes(record(config))


def in_memory(
    episodes: Episodes, tokenizer: ConvTokenizer, streams: int
) -> list[list[torch.Tensor]]:
    """Return the encoder's inputs, a frame of as many streams side by side as in tokenize."""
    videos = [
        torch.cat(list(EpisodeFrames(episodes, key, tokenizer.spec))) for key in episodes.keys
    ]
    groups = [torch.stack(videos[i : i + streams]) for i in range(0, len(videos), streams)]
    # Converted one by one, so that they lie in memory as those of a session do.
    return [[to_video(frame) for frame in group.split(1, dim=1)] for group in groups]


@torch.no_grad()
def bare(tokenizer: ConvTokenizer, groups: list[list[torch.Tensor]]) -> None:
    """Encoder and quantizer, a frame of every stream at a time, and nothing else."""
    for group in groups:
        caches = None
        for video_BC1HW in group:
            latents_BZthw, caches, _ = tokenizer.encoder(video_BC1HW, caches)
            tokenizer.quantizer.quantize(rearrange(latents_BZthw, "B Z t h w -> B (t h w) Z"))


def quantizers(report: Report, folder: Path, quick: bool, seeds: int, updates: int) -> None:
    """Train and measure every quantizer with every seed."""
    episodes = recorded(folder / "pong", *((4, 24) if quick else (16, 160)), 64, 64)
    training = replace(TRAINING, num_steps=updates)
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in QUANTIZERS}
    for seed in range(1 if quick else seeds):
        for name, quantizer in QUANTIZERS.items():
            say(f"quantizers: {name}, seed {seed}")
            run = folder / "runs" / f"{name}-{seed}"
            model = replace(SMALL, quantizer=quantizer)
            before = time.process_time()
            trained = train_conv_tokenizer(
                episodes, run, model=model, training=replace(training, seed=seed)
            )
            seconds = time.process_time() - before
            tokenizer = ConvTokenizer.from_pretrained(trained)
            found[name].append(
                {
                    "parameters": sum(p.numel() for p in tokenizer.parameters()),
                    **quality(tokenizer, episodes),
                    "s/update": seconds / training.num_steps,
                }
            )
    rows = [
        {
            "quantizer": name,
            "bits a cell": bits(QUANTIZERS[name]),
            "parameters": runs[0].pop("parameters"),
            **{key: spread([run[key] for run in runs]) for key in runs[0]},
        }
        for name, runs in found.items()
    ]
    settings = {
        "updates": training.num_steps,
        "clips": training.batch_clips,
        "frames of a clip": training.clip_frames,
        "seeds": list(range(1 if quick else seeds)),
        "game": GAME,
        "episodes": len(episodes.keys),
        "held out": len(held_out(episodes)),
        "median and range of": "seeds",
    }
    report.table("quantizers", rows, settings=settings)


def bits(config: QuantizerConfig) -> float:
    """Return how much a cell's codes can say."""
    return float(config.depth * torch.tensor(float(config.size)).log2())


def held_out(episodes: Episodes) -> list[str]:
    """Return the episodes that are measured: those that training does not see."""
    return list(episodes.split("validation") or episodes.keys)


def quality(tokenizer: ConvTokenizer, episodes: Episodes) -> dict[str, float]:
    """Return how well held-out episodes come back, and how many codes that takes."""
    keys = held_out(episodes)
    videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in keys]
    lengths = []
    for key in keys:
        with episodes.open(key) as episode:
            lengths.append(episode.num_frames)
    errors, moving_errors, objects = [], [], None
    for true_THWC, made_THWC in reconstructed_clips(videos, lengths, tokenizer, batch=16):
        error_BTHW = squared_error(true_THWC[None], made_THWC[None])
        errors.append(error_BTHW.flatten())
        moving_errors.append(error_BTHW[moving_pixels(true_THWC[None])])
        counts = small_objects(true_THWC[None], made_THWC[None])
        objects = counts if objects is None else objects + counts
    codes = count_codes(
        torch.cat(encode_videos(videos, lengths, tokenizer, batch=16))[None],
        tokenizer.spec.codes,
    ).numbers()
    shares = objects.numbers()
    return {
        "PSNR, dB": decibels(float(torch.cat(errors).mean())),
        "moving PSNR, dB": decibels(float(torch.cat(moving_errors).mean())),
        "small recall": shares["recall"] or 0.0,
        "false pixels/frame": shares["false_pixels_per_frame"],
        "codes used": codes["codes_used_fraction"],
        "perplexity": codes["perplexity"],
    }


if __name__ == "__main__":
    main()
