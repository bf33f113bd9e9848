"""Recordings whose frames say what was done, as strangers keep them: tiny videos, files of actions.

    played("keys", 20)              ->  World: an ActionSpec, raw actions, frames that show them
    write_video, write_actions      ->  NAME.mp4, NAME.csv, ...
    assert_aligned(episode, world)  ->  every action stands between the frames that it joins

Each frame is 8 x 8 blocks, black or white, so that any codec keeps them: its own number in two
rows, whether an action led to it in one, and that action's slots in those below.
"""

import csv
import io
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from worldloom.common import ActionSpec, Episode, EpisodesSpec
from worldloom.pipelines.ingest import IngestConfig, episodes_spec
from worldloom.pipelines.ingest_worker import IngestJob, Reader
from worldloom.pipelines.sources import Source, open_source

SIDE = 64
FPS = 20
KEYS = ("w", "a", "s", "d", "space")
SPECS = {
    "none": ActionSpec.none(),
    "discrete": ActionSpec.discrete(["noop", "left", "right", "fire", "jump"]),
    "keys": ActionSpec.keys(KEYS),
    "multi_discrete": ActionSpec.multi_discrete([3, 5], names=["move", "look"]),
    "continuous": ActionSpec.continuous([-1, -2], [1, 2], names=["steer", "gas"], bins=11),
}
_CODECS = {
    ".mp4": ("libx264", "yuv420p", {"crf": "12", "g": "12"}),
    ".mov": ("libx264", "yuv420p", {"crf": "12"}),
    ".mkv": ("ffv1", "bgr0", {}),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "12", "b": "0", "deadline": "realtime"}),
    ".gif": ("gif", "rgb8", {}),
    ".avi": ("mpeg4", "yuv420p", {"qmin": "1", "qmax": "2"}),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """What was played: `raw[i]` led from frame i to frame i + 1."""

    spec: ActionSpec
    raw: Any
    frames_THWC: Any


def played(kind: str, num_frames: int, /, *, seed: int = 0, side: int = SIDE) -> World:
    """Return a recording of random actions."""
    rng, spec, steps = np.random.default_rng(seed), SPECS[kind], num_frames - 1
    if kind == "none":
        raw = np.zeros((steps, 0), np.int64)
    elif kind == "discrete":
        raw = rng.integers(0, 5, steps)
    elif kind == "keys":
        raw = rng.integers(0, 2, (steps, len(KEYS)))
    elif kind == "multi_discrete":
        raw = np.stack([rng.integers(0, 3, steps), rng.integers(0, 5, steps)], axis=1)
    else:  # centres of bins, so that a mean of one value is that value
        raw = spec.decode(rng.integers(0, 11, (steps, 2)))
    slots = spec.encode(raw)
    frames = [draw_frame(0, None, side)] + [draw_frame(i + 1, slots[i], side) for i in range(steps)]
    return World(spec, raw, np.stack(frames))


def draw_frame(step: int, slots: Any, side: int = SIDE) -> Any:
    """Return a frame that shows its number and the slots of the action that led to it."""
    blocks = np.zeros((8, 8), np.uint8)
    blocks[0], blocks[1] = _bits(step >> 8), _bits(step & 255)
    if slots is not None:
        blocks[2] = 1
        for row, slot in enumerate(slots, start=3):
            blocks[row] = _bits(int(slot))
    cell = np.ones((side // 8, side // 8, 3), np.uint8)
    return np.kron(blocks[..., None] * np.uint8(235) + np.uint8(10), cell)


def read_frame(frame_HWC: Any, num_slots: int) -> tuple[int, list[int] | None]:
    """Return the number that a frame shows, and the slots of the action that led to it."""
    side = frame_HWC.shape[0] // 8
    blocks = frame_HWC.astype(float).mean(2).reshape(8, side, 8, side).mean((1, 3)) > 127
    numbers = [int("".join("01"[bit] for bit in row), 2) for row in blocks.astype(int)]
    return 256 * numbers[0] + numbers[1], numbers[3 : 3 + num_slots] if blocks[2].all() else None


def _bits(number: int) -> list[int]:
    return [int(bit) for bit in f"{number:08b}"]


def combined(kind: str, raw: Any) -> Any:
    """Return what docs/data.md says that some actions in a row become under a frame skip."""
    if kind == "keys":
        return raw.any(0).astype(int)
    return raw.mean(0) if kind == "continuous" else raw[-1]


def assert_aligned(
    episode: Episode, world: World, /, *, frame_skip: int = 1, first: int = 0
) -> None:
    """Fail unless every action of an episode is what led from its frame to the next.

    Args:
        episode: made of the world's recording.
        world: which knows the right answer.
        frame_skip: of the ingest.
        first: number of the episode's first frame in the recording.
    """
    spec = world.spec
    read = [read_frame(frame, spec.num_slots) for frame in episode.frames()]
    steps = [step for step, _ in read]
    assert steps == [first + i * frame_skip for i in range(episode.num_frames)]
    slots = spec.encode(world.raw)
    for step, shown in read:
        assert shown == (slots[step - 1].tolist() if step else None), step
    assert episode.spec.actions.sizes == spec.sizes
    there = episode.spec.actions.encode(episode.actions)
    for i, (start, stop) in enumerate(pairwise(steps)):
        wanted = np.asarray(combined(spec.kind, world.raw[start:stop]))[None]
        assert (there[i] == spec.encode(wanted)[0]).all(), f"action {i}"
    assert len(there) == len(steps) - 1


def write_video(path: Path, frames_THWC: Any, /, *, fps: Any = FPS, options: Any = None) -> Path:
    """Write a tiny video; its name says in which container and codec."""
    codec, pixels, plain = _CODECS[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=fps, options=plain if options is None else options
        )
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = pixels
        for frame_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())
    return path


def write_actions(
    path: Path, world: World, /, *, alignment: str = "next", full: bool = True
) -> Path:
    """Write the actions beside a video: T rows, or T - 1; the row that is no action is the first
    action once more, so that a reader that takes it is found out by its number of rows only."""
    raw = world.raw
    if full:
        extra = raw[:1]
        raw = np.concatenate([raw, extra] if alignment == "next" else [extra, raw])
    spec, rows = world.spec, raw.tolist()
    if path.suffix == ".npz":
        np.savez(path, action=raw.astype(bool) if spec.kind == "keys" else raw)
    elif path.suffix == ".jsonl":
        if spec.kind == "keys":
            named = [
                {"t": i, "keys": [k for k, down in zip(KEYS, row, strict=True) if down]}
                for i, row in enumerate(rows)
            ]
        else:
            named = [{"t": i, "action": row} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
    else:
        text = io.StringIO()
        writer = csv.writer(text)
        columns = ["action"] if spec.kind == "discrete" else spec.names
        writer.writerow(["frame", *columns])
        for i, row in enumerate(rows):
            if spec.kind == "discrete":
                writer.writerow([i, spec.names[row]])
            else:
                writer.writerow([i, *row])
        path.write_text(text.getvalue())
    return path


def read_here(config: IngestConfig, /) -> tuple[Source, list[Any]]:
    """Ingest in this process, which is faster; return the source and what became of each."""
    source = open_source(config.kind, config.path.absolute(), config)
    spec: EpisodesSpec = episodes_spec(config, source)
    job = IngestJob(
        folder=config.output.absolute(),
        source=source,
        spec=spec,
        resize=config.resize,
        max_frames=config.max_frames,
    )
    reader = Reader(job)
    answers = [reader.answer(recording.key) for recording in source.recordings]
    spec.write(config.output)
    return source, answers
