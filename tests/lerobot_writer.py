"""Small LeRobot data sets, v2.1 and v3.0, written with pyarrow and PyAV.

    LerobotWriter("v3.0", worlds).write(folder)

The package lerobot (8 GB with what it needs) is not installed. Names, columns and types are those
of `create_empty_dataset_info`, `DEFAULT_FEATURES` and the path templates in its
`datasets/utils.py` (tag v0.3.3 for v2.1, v0.4.0 for v3.0). Set a field otherwise to have a data
set that is not what it should be.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from video_worlds import World, write_video

CAMERA = "observation.images.top"
FPS = 20
TEMPLATES = {
    "v2.1": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3.0": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}
_TYPES = {
    "discrete": ("int64", pa.int64()),
    "multi_discrete": ("int64", pa.int64()),
    "keys": ("bool", pa.bool_()),
    "continuous": ("float32", pa.float32()),
}


@dataclass
class LerobotWriter:
    """A data set of some worlds, one an episode; in v3, `split` of them share a file."""

    version: str
    worlds: Sequence[World]
    images: bool = False
    split: int = 2
    row_group: int = 7
    info: dict[str, Any] = field(default_factory=dict)
    """What info.json says otherwise."""
    features: dict[str, Any] = field(default_factory=dict)
    """Features that are others, or more."""
    stats: dict[str, Any] | None = field(default_factory=dict)
    """What the statistics say of the action otherwise; None writes none."""
    rewards: bool = False

    def write(self, folder: Path) -> Path:
        (folder / "meta").mkdir(parents=True)
        self._index = 0
        spec = self.worlds[0].spec
        self._write_json(folder / "meta" / "info.json", self._info(spec))
        (self._write_v2 if self.version == "v2.1" else self._write_v3)(folder)
        return folder

    def _info(self, spec: Any) -> dict[str, Any]:
        data, video = TEMPLATES[self.version]
        width = 1 if spec.kind == "discrete" else spec.raw_width
        numbers = {
            name: {"dtype": "int64", "shape": [1], "names": None}
            for name in ("frame_index", "episode_index", "index", "task_index")
        }
        features = {
            "action": {
                "dtype": _TYPES[spec.kind][0],
                "shape": [width],
                "names": None if spec.kind == "discrete" else list(spec.names),
            },
            CAMERA: {
                "dtype": "image" if self.images else "video",
                "shape": list(self.worlds[0].frames_THWC.shape[1:]),
                "names": ["height", "width", "channels"],
            },
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **numbers,
        }
        if self.rewards:
            features["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
        return {
            "codebase_version": self.version,
            "robot_type": "test",
            "total_episodes": len(self.worlds),
            "total_frames": sum(len(world.frames_THWC) for world in self.worlds),
            "total_tasks": 1,
            "chunks_size": 1000,
            "fps": FPS,
            "splits": {"train": f"0:{len(self.worlds)}"},
            "data_path": data,
            "video_path": None if self.images else video,
            "features": {**features, **self.features},
            **self.info,
        }

    def _table(self, number: int, world: World) -> pa.Table:
        """The rows of one episode: the last action leads nowhere."""
        count = len(world.frames_THWC)
        kind = world.spec.kind
        values = np.concatenate([world.raw, world.raw[:1]])
        type_ = _TYPES[kind][1]
        rows = values.astype(bool).tolist() if kind == "keys" else values.tolist()
        width = world.spec.raw_width
        columns = {
            "action": pa.array(rows, type_ if kind == "discrete" else pa.list_(type_, width)),
            "timestamp": pa.array(np.arange(count) / FPS, pa.float32()),
            "frame_index": pa.array(range(count), pa.int64()),
            "episode_index": pa.array([number] * count, pa.int64()),
            "index": pa.array(range(self._index, self._index + count), pa.int64()),
            "task_index": pa.array([0] * count, pa.int64()),
        }
        if self.images:
            pictures = [{"bytes": png(frame), "path": None} for frame in world.frames_THWC]
            type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns[CAMERA] = pa.array(pictures, type_)
        if self.rewards:
            columns["next.reward"] = pa.array(0.5 * np.arange(count), pa.float32())
        self._index += count
        return pa.table(columns)

    def _stats(self, worlds: Sequence[World]) -> dict[str, Any]:
        """Statistics as LeRobot keeps them; a NaN elsewhere, as it writes too."""
        spec = self.worlds[0].spec
        values = np.concatenate([w.raw.reshape(len(w.raw), -1) for w in worlds]).astype(float)
        low, high = values.min(0).tolist(), values.max(0).tolist()
        if spec.kind == "continuous":
            low, high = list(spec.low), list(spec.high)
        action = {"min": low, "max": high, "mean": [0.0], "count": [len(values)]}
        action |= self.stats or {}
        return {"action": action, "timestamp": {"std": [float("nan")]}}

    def _write_v2(self, folder: Path) -> None:
        data, video = TEMPLATES["v2.1"]
        lines, stats = [], []
        for number, world in enumerate(self.worlds):
            place = {"episode_chunk": 0, "episode_index": number, "video_key": CAMERA}
            self._write_table(folder / data.format(**place), self._table(number, world))
            if not self.images:
                write_video(folder / video.format(**place), world.frames_THWC, fps=FPS)
            count = len(world.frames_THWC)
            lines.append({"episode_index": number, "tasks": ["push"], "length": count})
            stats.append({"episode_index": number, "stats": self._stats([world])})
        self._write_lines(folder / "meta" / "episodes.jsonl", lines)
        self._write_lines(folder / "meta" / "tasks.jsonl", [{"task_index": 0, "task": "push"}])
        if self.stats is not None:
            self._write_lines(folder / "meta" / "episodes_stats.jsonl", stats)

    def _write_v3(self, folder: Path) -> None:
        data, video = TEMPLATES["v3.0"]
        rows: list[dict[str, Any]] = []
        for file, first in enumerate(range(0, len(self.worlds), self.split)):
            worlds = self.worlds[first : first + self.split]
            place = {"chunk_index": 0, "file_index": file, "video_key": CAMERA}
            tables, shown = [], 0
            for number, world in enumerate(worlds, start=first):
                start, count = self._index, len(world.frames_THWC)
                tables.append(self._table(number, world))
                row = {
                    "episode_index": number,
                    "tasks": ["push"],
                    "length": count,
                    "data/chunk_index": 0,
                    "data/file_index": file,
                    "dataset_from_index": start,
                    "dataset_to_index": start + count,
                    "meta/episodes/chunk_index": 0,
                    "meta/episodes/file_index": 0,
                }
                if not self.images:
                    row |= {
                        f"videos/{CAMERA}/chunk_index": 0,
                        f"videos/{CAMERA}/file_index": file,
                        f"videos/{CAMERA}/from_timestamp": shown / FPS,
                        f"videos/{CAMERA}/to_timestamp": (shown + count) / FPS,
                    }
                shown += count
                rows.append(row)
            self._write_table(folder / data.format(**place), pa.concat_tables(tables))
            if not self.images:
                frames_THWC = np.concatenate([world.frames_THWC for world in worlds])
                write_video(folder / video.format(**place), frames_THWC, fps=FPS)
        self._write_table(
            folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet",
            pa.Table.from_pylist(rows),
        )
        if self.stats is not None:
            self._write_json(folder / "meta" / "stats.json", self._stats(self.worlds))

    def _write_table(self, path: Path, table: pa.Table) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # 64: else a page, the least that can be read, holds a thousand pictures.
        pq.write_table(table, path, row_group_size=self.row_group, write_batch_size=64)

    def _write_json(self, path: Path, content: Any) -> None:
        path.write_text(json.dumps(content, indent=4))

    def _write_lines(self, path: Path, rows: Sequence[Any]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def png(frame_HWC: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, format="PNG")
    return buffer.getvalue()
