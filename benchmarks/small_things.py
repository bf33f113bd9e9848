"""Do the small things of a game survive its tokenizer: VizDoom's monster, Pong's ball?

    python benchmarks/small_things.py                   both games, about 20 minutes on 2 cores
    python benchmarks/small_things.py --game pong       one of them

For each game: record it as the demo does (Pong at 80x80), train the demo's tokenizer twice with
`worldloom train-tokenizer`, once as it is and once with AdamW and no weight on hard pixels, and
reconstruct every held-out frame. The thing is known by a colour that nothing else in its game has:

    monster   blue over 10 levels above green (8 pixels of 64x64, in a room of brown)
    ball      blue above 100 within the playfield (2 pixels of 80x80), but for the first 4 frames

A pixel of it is recalled if more than half of its colour's distance from the background is back; a
frame counts if half of its pixels are. A false one is of that colour in the reconstruction, over a
pixel away from every true one. Small recall is `metrics.small_objects` of everything small that
moves. Tables go to stdout, progress to stderr.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import Report, arguments
from torch import Tensor
from torch.nn.functional import max_pool2d
from worldloom.common import Episodes
from worldloom.pipelines.encoding import EpisodeFrames, reconstructed_clips
from worldloom.tokenizer import VideoTokenizer, load_tokenizer
from worldloom.tokenizer.metrics import decibels, moving_pixels, small_objects, squared_error


@dataclass(frozen=True)
class Game:
    """A game, how it is recorded and learned, and the thing to look for."""

    thing: str
    record: tuple[str, ...]
    train: tuple[str, ...]
    quick: tuple[str, ...]
    shade: Callable[[Tensor], Tensor]
    """Of frames_NHWC, float: the number that tells the thing, (N, rows, columns)."""
    above: float
    """A pixel whose shade is over this is the thing's."""
    background: float
    """The shade of what is around it."""
    first_frame: int = 0
    """Frames of an episode before this one are not looked at for the thing."""


def monster_shade(frames_NHWC: Tensor) -> Tensor:
    """Return blue minus green."""
    return frames_NHWC[..., 2] - frames_NHWC[..., 1]


def ball_shade(frames_NHWC: Tensor) -> Tensor:
    """Return blue within the playfield, whose walls are grey at the rows above and below."""
    return frames_NHWC[:, 14:73, :, 2]


DEMO = ("--preset", "demo")
GAMES = {
    "vizdoom": Game(
        "monster",
        DEMO,
        DEMO,
        ("--num-episodes", "10", "--max-frames", "20"),
        monster_shade,
        above=10,
        background=-10,
    ),
    "pong": Game(
        "ball",
        (*DEMO, "--env", "ALE/Pong-v5", "--env-kwargs", "", "--height", "80", "--width", "80",
         "--num-episodes", "40", "--max-frames", "600"),
        (*DEMO, "--model.height", "80", "--model.width", "80", "--training.num-steps", "500"),
        ("--num-episodes", "10", "--max-frames", "20"),
        ball_shade,
        above=100,
        background=17,
        # ALE draws the first frame in another palette, and what looks back over time repaints the
        # field for three frames more: about 900 false pixels in each of these, in every episode.
        first_frame=4,
    ),
}  # fmt: skip
WAYS = {
    "muon, hard pixels": (),
    "adamw": ("--training.optimizer", "adamw", "--training.hard-pixel-power", "0"),
}
QUICK = ("--training.num-steps", "4", "--training.batch-clips", "4")


def worldloom(*words: str) -> None:
    """Run a command as a person would."""
    code = "from worldloom.pipelines.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def measure(game: Game, episodes: Episodes, tokenizer: VideoTokenizer) -> dict[str, float | None]:
    """Return the numbers of one tokenizer over every held-out frame."""
    true_pixels = back = false_pixels = frames_with = frames_back = frames = 0
    error = moving_error = pixels = moving_pixels_count = 0.0
    small = None
    for first, true_THWC, decoded_THWC in clips(episodes, tokenizer):
        true, decoded = game.shade(true_THWC.float()), game.shade(decoded_THWC.float())
        looked_at = torch.arange(first, first + len(true)) >= game.first_frame
        there = (true > game.above) & looked_at[:, None, None]
        recalled = there & (decoded > (true + game.background) / 2)
        near = max_pool2d(there.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
        false_pixels += int(((decoded > game.above) & looked_at[:, None, None] & ~near).sum())
        per_frame, recalled_per_frame = there.sum((1, 2)), recalled.sum((1, 2))
        has = per_frame > 0
        true_pixels, back = true_pixels + int(per_frame.sum()), back + int(recalled.sum())
        frames_with += int(has.sum())
        frames_back += int((has & (2 * recalled_per_frame >= per_frame)).sum())
        frames += int(looked_at.sum())
        error_BTHW = squared_error(true_THWC[None], decoded_THWC[None]).double()
        moving = error_BTHW[moving_pixels(true_THWC[None])]
        error, pixels = error + float(error_BTHW.sum()), pixels + error_BTHW.numel()
        moving_error += float(moving.sum())
        moving_pixels_count += len(moving)
        counts = small_objects(true_THWC[None], decoded_THWC[None])
        small = counts if small is None else small + counts
    numbers = small.numbers() if small is not None else {}
    return {
        "PSNR dB": decibels(error / pixels),
        "moving dB": decibels(moving_error / max(1.0, moving_pixels_count)),
        "small recall": numbers.get("recall"),
        "pixels recalled": back / true_pixels if true_pixels else None,
        "frames recalled": frames_back / frames_with if frames_with else None,
        "false pixels a frame": false_pixels / max(1, frames),
        "frames with it": frames_with,
    }


def clips(episodes: Episodes, tokenizer: VideoTokenizer) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first frame, true, decoded) of the clips of every held-out episode."""
    for key in episodes.split("validation"):
        with episodes.open(key) as episode:
            lengths = [episode.num_frames]
        first = 0
        videos = [EpisodeFrames(episodes, key, tokenizer.spec)]
        for true_THWC, decoded_THWC in reconstructed_clips(videos, lengths, tokenizer, batch=1):
            yield first, true_THWC, decoded_THWC
            first += len(true_THWC)


def main() -> None:
    """Record, train, measure, print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--game", choices=sorted(GAMES), help="one of the games, not both")
    parser.add_argument("--seed", type=int, default=0, help="of the recording and the trainings")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep recordings and runs there, and reuse them"
    )
    asked = parser.parse_args()
    report = Report("small_things", quick=asked.quick, packages=("vector-quantize-pytorch",))
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="worldloom-"))
    try:
        for name in [asked.game] if asked.game else GAMES:
            game = GAMES[name]
            rows = compare(game, folder / name, seed=asked.seed, quick=asked.quick)
            settings = {"thing": game.thing, "seed": asked.seed, "train": " ".join(game.train)}
            report.table(name, rows, settings=settings)
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    report.write(asked.json)


def compare(game: Game, folder: Path, *, seed: int, quick: bool) -> list[dict[str, Any]]:
    """Record a game, train on it both ways, and return a row for each."""
    episodes = folder / "episodes"
    worldloom("record", *game.record, *(game.quick if quick else ()),
              "--seed", str(seed), "--output", str(episodes))  # fmt: skip
    rows = []
    for way, flags in WAYS.items():
        run = folder / way.replace(", ", "-").replace(" ", "-")
        worldloom("train-tokenizer", *game.train, *flags, *(QUICK if quick else ()),
                  "--training.seed", str(seed), "--episodes", str(episodes),
                  "--output", str(run))  # fmt: skip
        tokenizer = load_tokenizer(run / "model")
        with torch.inference_mode():
            rows.append({"trained with": way, **measure(game, Episodes(episodes), tokenizer)})
    return rows


if __name__ == "__main__":
    main()
