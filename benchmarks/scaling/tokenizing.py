"""How much faster `worldloom tokenize` is with several processes, and what the machine allows.

    python benchmarks/tokenize.py                        1 process and 2, in about 5 minutes

scaling: frames per second of 1 process and of several, from the first unit's begin to the last
one's end, in the very processes that `--workers` starts (a worker reads, resizes, encodes, measures
the reconstruction and writes; one thread each). Beside it, as the machine's own limit, copies of a
bare forward pass of the same network on frames in memory, in as many processes: where two of them
are not twice as fast as one, neither can anything else be. All take turns, after a warm-up; stated
is the median of the turns' ratios.

start: seconds until the processes have imported torch, loaded the tokenizer and said so, which is
paid once a run and is not in the above.

Episodes of Pong are recorded for it. Tables go to stdout, progress to stderr. On a machine that is
busy otherwise, the numbers mean little.
"""

import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from report import Report, arguments, spread
from worldloom.common import Episodes, say
from worldloom.pipelines.crew import Crew
from worldloom.pipelines.record import RecordConfig, record
from worldloom.pipelines.tokenize import keep_plan
from worldloom.pipelines.units import TokenizeJob, make_plan, open_unit_worker
from worldloom.tokenizer import ConvTokenizer, QuantizerConfig, TokenizerConfig, Trained

GAME = "ALE/Pong-v5"

# The demo's: 64x64 frames, 8x8 codes of 1024.
MODEL = TokenizerConfig(
    height=64,
    width=64,
    patch=4,
    widths=(64, 128, 192),
    num_blocks=(1, 2, 2),
    quantizer=QuantizerConfig(vocab_size=1024, code_dim=16),
)


Task = tuple[str, int]
"""("tokenize", number of a unit) or ("bare forward", frames of every stream)."""


class Worker:
    """What `--workers` starts, and beside it encoder and quantizer alone on frames in memory."""

    def __init__(self, job: TokenizeJob) -> None:
        self._units = open_unit_worker(job)
        self._tokenizer = ConvTokenizer.from_pretrained(Path(job.tokenizer))
        spec, rng = self._tokenizer.spec, torch.Generator().manual_seed(0)
        shape = (job.batch_episodes, 3, 1, spec.height, spec.width)
        self._frames_BC1HW = torch.rand(shape, generator=rng) * 2 - 1
        self.greeting = torch.get_num_threads()

    def answer(self, task: Task) -> None:
        """Do a unit, or as many bare passes."""
        what, number = task
        if what == "tokenize":
            self._units.answer(number)
        else:
            self._bare(number)

    @torch.no_grad()
    def _bare(self, frames: int) -> None:
        caches = None
        for _ in range(frames):
            latents_BZthw, caches, _ = self._tokenizer.encoder(self._frames_BC1HW, caches)
            self._tokenizer.quantizer.quantize(rearrange(latents_BZthw, "B Z t h w -> B (t h w) Z"))

    def close(self) -> None:
        """End."""
        self._units.close()


def main() -> None:
    """Measure."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--turns", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--processes", type=int, default=2, help="to compare with 1 (default 2)")
    parser.add_argument("--frames", type=int, default=192, help="of an episode (default 192)")
    options = parser.parse_args()
    many, turns = options.processes, 1 if options.quick else options.turns
    streams, frames = (2, 20) if options.quick else (16, options.frames)
    report = Report("tokenize", quick=options.quick, packages=("ale-py",))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        units = range(2 * many)
        job = prepared(folder, options.quick, len(units), streams, frames)
        lengths = [e.num_frames for e in opened(job.episodes)]
        tasks: dict[str, tuple[list[Task], int]] = {
            "tokenize": ([("tokenize", unit) for unit in units], sum(lengths)),
            "bare forward": (
                [("bare forward", frames)] * len(units), streams * frames * len(units)
            ),
        }  # fmt: skip
        crews: dict[int, Crew] = {}
        started: dict[int, list[float]] = {1: [], many: []}
        for last in (True,) if options.quick else (False, False, True):
            for count, seconds in started.items():
                crew, began = Crew(Worker, job, size=count), time.perf_counter()
                with ExitStack() as leaving:
                    leaving.enter_context(crew)
                    seconds.append(time.perf_counter() - began)
                    if last:
                        crews[count] = crew
                        stack.enter_context(leaving.pop_all())
        speeds: dict[tuple[str, int], list[float]] = {
            (what, count): [] for what in tasks for count in crews
        }
        for turn in range(-1, turns):
            say(f"scaling: turn {turn + 1} of {turns}")
            for (what, count), found in speeds.items():
                these, num_frames = tasks[what]
                seconds_taken = timed(crews[count], these)
                if turn >= 0:  # the first warms up caches, allocator and clock
                    found.append(num_frames / seconds_taken)
    rows = [
        {
            "what": what,
            "1 process, frames/s": spread(speeds[what, 1]),
            f"{many} processes, frames/s": spread(speeds[what, many]),
            "times as fast": ratio(speeds[what, many], speeds[what, 1]),
        }
        for what in tasks
    ]
    settings = {
        "shards": len(units),
        "episodes a shard": streams,
        "frames": sum(lengths),
        "turns": turns,
        "seed": 0,
    }
    report.table("scaling", rows, settings=settings)
    limit = {
        "tokenize, of the bare forward's": ratio(
            [a / b for a, b in zip(speeds["tokenize", many], speeds["tokenize", 1], strict=True)],
            [
                a / b
                for a, b in zip(
                    speeds["bare forward", many], speeds["bare forward", 1], strict=True
                )
            ],
        )
    }
    report.table("of the machine's limit", [limit], settings={"processes": many, "seed": 0})
    start_rows = [
        {"processes": count, "start, s": spread(values)} for count, values in started.items()
    ]
    report.table("start", start_rows, settings={"starts": len(started[1]), "seed": 0})
    report.write(options.json)


def prepared(folder: Path, quick: bool, units: int, streams: int, frames: int) -> TokenizeJob:
    """Record episodes, save a tokenizer with fresh weights, write the plan; return the job."""
    recorded = record(
        RecordConfig(
            env=GAME, output=folder / "episodes", num_episodes=units * streams, height=64, width=64,
            resize="stretch", max_frames=frames, workers=2,
        )
    )  # fmt: skip
    episodes = Episodes(recorded)
    model = replace(MODEL, widths=(8, 16, 16), num_blocks=(1, 1, 1)) if quick else MODEL
    trained = Trained(fps=episodes.spec.fps, frame_skip=episodes.spec.frame_skip)
    tokenizer = ConvTokenizer(model, trained=trained).eval()
    tokenizer.save(folder / "tokenizer", card="fresh weights")
    sizes = {"shard_episodes": streams, "batch_episodes": streams}
    plan = make_plan(episodes, tokenizer, **sizes)
    keep_plan(folder / "shards", plan)
    return TokenizeJob(
        episodes=recorded, tokenizer=str(folder / "tokenizer"), output=folder / "shards",
        device="cpu", threads=1, skip_bad=0, plan=plan, **sizes,
    )  # fmt: skip


def opened(folder: Path) -> Iterable[Any]:
    """Yield every episode, open."""
    episodes = Episodes(folder)
    for key in episodes.keys:
        with episodes.open(key) as episode:
            yield episode


def timed(crew: Crew, tasks: Iterable[Task]) -> float:
    """Return the seconds until every task is answered."""
    began = time.perf_counter()
    for _ in crew.answers(tasks):
        pass
    return time.perf_counter() - began


def ratio(these: list[float], those: list[float]) -> dict[str, float]:
    """Return how many times as fast these are, turn by turn."""
    return spread([one / other for one, other in zip(these, those, strict=True)])
