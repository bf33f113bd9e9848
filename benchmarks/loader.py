"""How fast windows come out of token shards, in how much memory, and who waits for them.

    python benchmarks/loader.py                        all three, in about 5 minutes on 2 cores
    python benchmarks/loader.py --only throughput      one alone: throughput, memory, waiting

throughput: tokens (codes) per second in batches of 16 windows of 16 frames x 256 codes, as int64
tensors on the CPU, of four ways to keep and read the same codes:

    ours         token shards, memory-mapped: random windows of all episodes
    ours, thread the same, made in the thread that training uses, one batch ahead
    ours, stream token shards read as a stream through webdataset, shuffled in a buffer
    wds windows  webdataset tars with one sample a window, cut beforehand, read in order, unshuffled
    npy episodes one npy an episode, all kept mapped, random windows sliced

each in this process and, where that makes sense, in 2 worker processes of a DataLoader. Readers
take turns for a fixed time each, their first batches of a turn uncounted; everything is in the
page cache. Stated is the median of the turns, and of their ratios to "wds windows" at its best: in
this process or in 2 others, whichever was faster in that turn.

memory: anonymous memory (without the page cache, which the system takes back when it likes) of a
process that has read windows of 1, 10 and 100 shards.

waiting: the share of the updates' time that training waits for data, as metrics.jsonl has it
(`data_wait_share`), with the settings of the preset `demo`, on shards of 8x8 codes of 1024.

Tables go to stdout, progress to stderr.
"""

import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import webdataset
from report import Report, arguments, spread
from torch.utils.data import DataLoader, Dataset
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    read_metrics,
    say,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import StreamConfig, Windows, WindowStream, train_dynamics_model
from worldloom.dynamics.loading import Ahead
from worldloom.pipelines.settings import preset_path, read_settings, stage_config
from worldloom.pipelines.train_dynamics import TrainDynamicsConfig

T, SIZE = 16, 16
ACTIONS = ActionSpec.discrete(["stay", "left", "right"])


def write_corpus(  # noqa: PLR0913 - what a corpus has
    folder: Path, *, shards: int, episodes: int, frames: int, grid: int, seed: int
) -> TokenShards:
    """Write token shards of random codes below 1024; the last episode of each is held out."""
    folder.mkdir(parents=True)
    codes = CodeSpec(vocab_size=1024, grid_height=grid, grid_width=grid, code_dim=16)
    rng = np.random.default_rng(seed)
    records = []
    for index in range(shards):
        rows = [
            TokenEpisode(
                key=f"e{index:04d}-{number:03d}",
                codes_thw=rng.integers(0, 1024, (frames, grid, grid), np.uint16),
                slots_TA=rng.integers(0, 3, (frames - 1, 1)),
                num_frames=frames,
                split="validation" if number == episodes - 1 else "train",
            )
            for number in range(episodes)
        ]
        records.append(write_shard(folder, index, rows, codes=codes, actions=ACTIONS))
    write_manifest(
        folder,
        records,
        tokenizer=TokenizerSpec(
            name="random",
            codes=codes,
            height=8 * grid,
            width=8 * grid,
            resize="exact",
            fps=8.75,
            frame_skip=4,
            compute_dtype="float32",
            fingerprint="0" * 64,
        ),
        actions=ACTIONS,
        # The same for every seed: corpora are mixed only if their tokenizer is one.
        codebook_VZ=np.random.default_rng(0).normal(size=(1024, 16)).astype(np.float32),
        fps=8.75,
        frame_skip=4,
        metrics={},
        source={"made": "at random"},
    )
    return TokenShards(folder)


def cut_windows(shards: TokenShards, folder: Path) -> list[str]:
    """Write webdataset tars with one sample a window, the windows side by side."""
    folder.mkdir()
    paths = []
    for shard in range(len(shards.files)):
        paths.append(str(folder / f"windows-{shard:06d}.tar"))
        with webdataset.TarWriter(paths[-1]) as tar:
            for episode in shards.in_shard(shard):
                row = shards.episodes[episode]
                for first in range(0, row.latent_frames - T + 1, T):
                    codes, slots = io.BytesIO(), io.BytesIO()
                    np.save(codes, shards.codes_thw(episode, first, first + T))
                    np.save(slots, shards.stored_slots_TA(episode, first, first + T - 1))
                    tar.write(
                        {
                            "__key__": f"{row.key}-{first:05d}",
                            "codes.npy": codes.getvalue(),
                            "actions.npy": slots.getvalue(),
                        }
                    )
    return paths


def write_episodes(shards: TokenShards, folder: Path) -> list[tuple[Path, Path, int]]:
    """Write one npy an episode of the codes, and one of the actions."""
    folder.mkdir()
    written = []
    for index, row in enumerate(shards.episodes):
        if row.split == "train":
            codes, slots = folder / f"{row.key}.codes.npy", folder / f"{row.key}.actions.npy"
            np.save(codes, shards.codes_thw(index))
            np.save(slots, shards.stored_slots_TA(index))
            written.append((codes, slots, row.latent_frames))
    return written


class Ours(Dataset[torch.Tensor]):
    """The i-th batch of windows of shards, for a DataLoader's workers."""

    def __init__(self, shards: TokenShards, seed: int) -> None:
        self.windows = Windows(shards, "train", window_frames=T)
        self.seed = seed

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.windows.batch(index, size=SIZE, seed=self.seed).codes_Bthw

    def __len__(self) -> int:
        return 1 << 40


class Npy(Dataset[torch.Tensor]):
    """The i-th batch of windows of one npy an episode."""

    def __init__(self, episodes: list[tuple[Path, Path, int]], seed: int) -> None:
        self.episodes = episodes
        self.seed = seed
        self.opened: dict[Path, np.ndarray] = {}

    def open(self, path: Path) -> np.ndarray:
        """Return a mapped array: to open one for every window is what would cost most."""
        if path not in self.opened:
            self.opened[path] = np.load(path, mmap_mode="r")
        return self.opened[path]

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, index])
        parts, actions = [], []
        for number in rng.integers(0, len(self.episodes), SIZE).tolist():
            codes, slots, frames = self.episodes[number]
            first = int(rng.integers(0, frames - T + 1))
            parts.append(self.open(codes)[first : first + T])
            actions.append(self.open(slots)[first : first + T - 1])
        torch.from_numpy(np.stack(actions).astype(np.int64))
        return torch.from_numpy(np.stack(parts).astype(np.int64))

    def __len__(self) -> int:
        return 1 << 40


def load_window(sample: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Read the two arrays of a sample."""
    return np.load(io.BytesIO(sample["codes.npy"])), np.load(io.BytesIO(sample["actions.npy"]))


def join_windows(samples: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """Make a batch of windows."""
    torch.from_numpy(np.stack([slots for _, slots in samples]).astype(np.int64))
    return torch.from_numpy(np.stack([codes for codes, _ in samples]).astype(np.int64))


def cut_beforehand(paths: list[str], workers: int) -> Iterator[torch.Tensor]:
    """Batches of webdataset tars with one sample a window, again and again."""
    # split_by_worker deals shards; an unshuffled list is what is fastest.
    dataset = (
        webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
        .map(load_window)
        .batched(SIZE, collation_fn=join_windows, partial=False)
        .repeat()
    )
    if workers:
        yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
    yield from dataset


def through_workers(dataset: Dataset[torch.Tensor], workers: int) -> Iterator[torch.Tensor]:
    """Batches of a data set, in order."""
    if not workers:
        yield from (dataset[index] for index in count())
    yield from DataLoader(dataset, batch_size=None, sampler=range(1 << 40), num_workers=workers)


def ahead(shards: TokenShards, seed: int) -> Iterator[torch.Tensor]:
    """Batches made in the thread that training uses."""
    windows = Windows(shards, "train", window_frames=T)
    with Ahead(windows, count(), size=SIZE, seed=seed) as batches:
        while True:
            yield batches.next().to("cpu").codes_Bthw


def streamed(shards: TokenShards, seed: int) -> Iterator[torch.Tensor]:
    """Batches of the same shards, as a stream."""
    stream = StreamConfig(url=str(shards.folder / "{file}"), buffer_windows=1024)
    windows = WindowStream(shards, "train", window_frames=T, stream=stream)
    for index in count():
        yield windows.batch(index, size=SIZE, seed=seed).codes_Bthw


def run_throughput(report: Report, folder: Path, *, quick: bool, seed: int) -> None:
    """Measure all readers, turn and turn about."""
    sizes = (2, 4, 48) if quick else (10, 32, 300)
    turns, seconds, warm = (1, 0.1, 1) if quick else (5, 2.0, 12)
    shards = write_corpus(
        folder / "shards", shards=sizes[0], episodes=sizes[1], frames=sizes[2], grid=16, seed=seed
    )
    say("loader: writing the same codes as windows and as one npy an episode")
    paths, episodes = (
        cut_windows(shards, folder / "windows"),
        write_episodes(shards, folder / "npy"),
    )
    make: dict[tuple[str, int], Callable[[], Iterator[torch.Tensor]]] = {
        ("ours", 0): lambda: through_workers(Ours(shards, seed), 0),
        ("ours, thread", 0): lambda: ahead(shards, seed),
        ("ours, stream", 0): lambda: streamed(shards, seed),
        ("wds windows", 0): lambda: cut_beforehand(paths, 0),
        ("npy episodes", 0): lambda: through_workers(Npy(episodes, seed), 0),
        ("ours", 2): lambda: through_workers(Ours(shards, seed), 2),
        ("wds windows", 2): lambda: cut_beforehand(paths, 2),
        ("npy episodes", 2): lambda: through_workers(Npy(episodes, seed), 2),
    }
    rates: dict[tuple[str, int], list[float]] = {name: [] for name in make}
    for turn in range(turns):
        say(f"loader: turn {turn + 1} of {turns}")
        for name, opened in make.items():
            batches = opened()
            for _ in range(warm):  # workers start, streams open, queues fill
                next(batches)
            tokens, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds:
                tokens += next(batches).numel()
            rates[name].append(tokens / spent / 1e6)
            batches.close()  # type: ignore[attr-defined]  # generators all
    best = [
        max(pair) for pair in zip(rates["wds windows", 0], rates["wds windows", 2], strict=True)
    ]
    report.table(
        "throughput",
        [
            {
                "reader": name,
                "workers": workers,
                "M tokens/s": spread(found),
                "ratio to wds windows": spread(
                    [rate / other for rate, other in zip(found, best, strict=True)]
                ),
            }
            for (name, workers), found in rates.items()
        ],
        settings={
            "batch": f"{SIZE} windows of {T} x 256 codes",
            "tokens": sizes[0] * sizes[1] * sizes[2] * 256,
            "turns": turns,
            "seconds a turn": seconds,
            "seed": seed,
        },
    )


MEASURE = """
import json, re, sys
from pathlib import Path
import numpy, torch
from worldloom.common import TokenShards
from worldloom.dynamics import StreamConfig, Windows, WindowStream

def anonymous_mb():
    return int(re.search(r"Anonymous: +(\\d+)", open("/proc/self/smaps_rollup").read())[1]) / 1024

kind, folder, num_batches = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.zeros(1), numpy.random.default_rng(0)
before = anonymous_mb()
shards = TokenShards(folder)
opened = anonymous_mb()
if kind == "mapped":
    windows = Windows(shards, "train", window_frames=16)
else:
    stream = StreamConfig(url=str(folder / "{file}"), buffer_windows=512)
    windows = WindowStream(shards, "train", window_frames=16, stream=stream)
for index in range(num_batches):
    windows.batch(index, size=16, seed=0)
print(json.dumps([opened - before, anonymous_mb() - before]))
"""


def run_memory(report: Report, folder: Path, *, quick: bool, seed: int) -> None:
    """Measure the memory of processes that read 1, 10 and 100 shards."""
    if not Path("/proc/self/smaps_rollup").exists():
        say("loader: this system does not tell anonymous memory; that part is left out")
        return
    episodes, frames, batches = (4, 24, 20) if quick else (32, 64, 2000)
    rows = []
    for shards in (1, 10) if quick else (1, 10, 100):
        corpus = folder / f"corpus-{shards}"
        write_corpus(corpus, shards=shards, episodes=episodes, frames=frames, grid=16, seed=seed)
        size = sum(path.stat().st_size for path in corpus.glob("*.tar")) / 2**20
        for kind in ("mapped", "stream"):
            say(f"loader: memory, {kind}, {shards} shards")
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, kind, str(corpus), str(batches)],
                check=True,
                capture_output=True,
                text=True,
            )
            opened, read = json.loads(done.stdout)
            rows.append(
                {
                    "reader": kind,
                    "shards": shards,
                    "on disk, MB": size,
                    "opened, MB": opened,
                    "read, MB": read,
                }
            )
        shutil.rmtree(corpus)
    report.table(
        "memory",
        rows,
        settings={"episodes a shard": episodes, "frames": frames, "batches": batches, "seed": seed},
    )


def run_waiting(report: Report, folder: Path, *, quick: bool, seed: int) -> None:
    """Train with the demo's settings, and see how long it waits."""
    corpora = [
        write_corpus(
            # 4x4 cells are the demo's; with more, updates take longer and hide the waiting.
            folder / f"demo-{number}",
            shards=3,
            episodes=16,
            frames=75,
            grid=4,
            seed=seed + number,
        )
        for number in range(2)
    ]
    first = corpora[0].folder
    table, where = read_settings(preset_path("demo"))["train_dynamics"]
    config = stage_config(
        TrainDynamicsConfig, table, where=where, shards=(first,), output=folder / "run"
    )
    steps = 2 if quick else 20
    training = replace(config.training, num_steps=steps, log_every=steps, seed=seed)
    model = config.model
    if quick:
        training = replace(training, batch_windows=4)
        model = replace(model, num_layers=1, dim=32, num_heads=2)
    kinds = {
        "one folder": {"shards": corpora[0]},
        "mixture of two": {"shards": corpora},
        "stream": {
            "shards": TokenShards(first, tars_elsewhere=True),
            "stream": StreamConfig(url=str(first / "{file}"), buffer_windows=512),
        },
    }
    turns = 1 if quick else 3
    shares: dict[str, list[float]] = {kind: [] for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns):
        for kind, asked in kinds.items():
            run = folder / f"{kind}-{turn}"
            train_dynamics_model(
                asked["shards"],
                run,
                model=model,
                training=training,
                stream=asked.get("stream"),
            )
            row = next(row for row in read_metrics(run) if "data_wait_share" in row)
            shares[kind].append(100 * row["data_wait_share"])
            cells = corpora[0].codes.cells
            predicted = training.batch_windows * (training.window_frames - 1) * cells
            seconds[kind].append(predicted / row["tokens_per_s"])
    report.table(
        "waiting",
        [
            {
                "windows of": kind,
                "s/update": spread(seconds[kind]),
                "waiting for data, %": spread(shares[kind]),
            }
            for kind in kinds
        ],
        settings={"preset": "demo", "updates": steps, "turns": turns, "seed": seed},
    )


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", choices=["throughput", "memory", "waiting"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report = Report("loader", quick=given.quick, packages=["webdataset"])
    parts = {"throughput": run_throughput, "memory": run_memory, "waiting": run_waiting}
    for name, run in parts.items():
        if given.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                run(report, Path(folder), quick=given.quick, seed=given.seed)
    report.write(given.json)


if __name__ == "__main__":
    main()
