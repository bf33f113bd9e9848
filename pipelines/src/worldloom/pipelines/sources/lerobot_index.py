"""The index of a LeRobot data set, v2.0, v2.1 or v3.0 -> its episodes and where each lies.

    DATASET/meta/*  ->  read_index  ->  Index: fps, features, episodes

| | v2 | v3 |
|---|---|---|
| episodes | meta/episodes.jsonl | meta/episodes/chunk-*/file-*.parquet |
| numbers | a parquet file an episode | many share one: dataset_from_index to dataset_to_index |
| frames | a video an episode | many share one: from from_timestamp on, as many as rows |

Where the files lie is written in info.json as templates, by a stranger: they are filled with the
known fields alone, and must stay inside the data set's folder.

Source: `src/lerobot/datasets/utils.py` of github.com/huggingface/lerobot (tags v0.3.3 and v0.4.0).
"""

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from worldloom.common import ConfigError, FormatError

from .parquet import ParquetFile
from .text_lines import bounded_lines

_MAX_JSON_BYTES = 1 << 26
_MAX_LINE_BYTES = 1 << 22
"""Of a jsonl; a line of statistics has a few numbers for each feature."""
_MAX_COUNT = 1 << 40
_MAX_TEXT = 1000
_MAX_TEMPLATE = 1000
_NUMBER_FORM = re.compile(r"(0?[1-9][0-9]?)?d?")
_CHUNKS_SIZE = 1000
"""Episodes a folder in v2, where info.json does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeEntry:
    """One episode, and where its rows and frames lie; paths are relative to the data set."""

    number: int
    length: int
    tasks: tuple[str, ...]
    data: str
    first_row: int | None
    """None: the whole file."""
    video: str | None
    """None: the frames are pictures in the rows."""
    start_s: float
    """When the first frame is shown in the video."""
    whole_video: bool
    """Whether the video has no other episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """A data set's index, for one of its cameras."""

    folder: Path
    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    camera: str
    episodes: Sequence[EpisodeEntry]

    @property
    def info(self) -> Path:
        """Where the features are described, for errors."""
        return self.folder / "meta" / "info.json"


def read_index(folder: Path, /, *, camera: str) -> Index:
    """Read the index of a data set.

    Args:
        folder: of the data set; `meta` lies in it.
        camera: feature of the frames; the only one there is, if empty.

    Raises:
        FormatError: naming the file and the field that is not what LeRobot writes.
        ConfigError: if there are several cameras and none is chosen, or another one.
    """
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise FormatError(f"{path}: not found; expected a LeRobot data set (v2.0, v2.1 or v3.0)")
    info = load_json(path)
    version = info.get("codebase_version")
    if not isinstance(version, str) or not re.fullmatch(r"v[23]\.[0-9]{1,3}", version):
        raise FormatError(
            f"{path}: codebase_version {version!r:.60}; v2.0, v2.1 and v3.0 are read (the package "
            "lerobot converts older ones)"
        )
    features = _features(info, path)
    chosen = _choose(features, camera, path)
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise FormatError(f"{path}: fps is {fps!r:.60}, must be a positive number")
    read = _episodes_v2 if version.startswith("v2") else _episodes_v3
    shown = features[chosen]["dtype"] == "video"
    episodes = sorted(read(folder, info, chosen if shown else None), key=lambda e: e.number)
    _check_numbers(episodes, info.get("total_episodes"), path)
    return Index(
        folder=folder,
        version=version,
        fps=float(fps),
        features=features,
        camera=chosen,
        episodes=tuple(episodes),
    )


def load_json(path: Path, /) -> dict[str, Any]:
    """Return the object in a JSON file; NaN is let through, for LeRobot writes it in statistics.

    Raises:
        FormatError: if it is missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise FormatError(f"{path}: not found")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise FormatError(f"{path}: more than {_MAX_JSON_BYTES} bytes")
    return _parse(path.read_bytes(), str(path))


def load_lines(path: Path, /) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where it stands and the object of every line of a jsonl.

    Raises:
        FormatError: naming the file, and the line that is too long or no JSON object.
    """
    lines = bounded_lines(path, expected="an object a line", max_line_bytes=_MAX_LINE_BYTES)
    for where, content in lines:
        yield where, _parse(content, where)


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: cannot be read as JSON ({error!s:.200})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object, got {value!r:.60}")
    return value


def fill_template(template: object, fields: Mapping[str, int | str], /, *, where: str) -> str:
    """Return the relative path that a template of info.json gives for these fields.

    Raises:
        FormatError: if it asks for anything but a field, or leads out of the folder.
    """
    refused = f"{where}: the template {template!r:.200}"
    if not isinstance(template, str) or len(template) > _MAX_TEMPLATE:
        raise FormatError(f"{refused} must be a path with fields in braces")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FormatError(f"{refused} is broken ({error})") from error
    text = ""
    for literal, name, form, conversion in parts:
        text += literal
        if name is None:
            continue
        # Not str.format: "{a.__class__}" and "{a[0]}" read attributes, "{a:>999999999}" fills
        # the memory.
        value = fields.get(name)
        wanted = isinstance(value, int) and _NUMBER_FORM.fullmatch(form or "")
        if value is None or conversion or not (wanted or (isinstance(value, str) and not form)):
            raise FormatError(
                f"{refused} asks for {name!r:.60}; there are {', '.join(fields)}, the numbers "
                "among them with a width, as in {episode_index:06d}"
            )
        text += format(value, form or "")
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text or not path.parts:
        raise FormatError(f"{refused} gives {text!r:.200}, which does not stay in the folder")
    return text


def _features(info: Mapping[str, Any], path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the features, each with a dtype and a shape of whole numbers."""
    features = info.get("features")
    if not isinstance(features, dict):
        raise FormatError(f"{path}: features is {features!r:.60}, must be an object")
    for name, feature in features.items():
        where = f"{path}: features: {name:.100}"
        if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
            raise FormatError(f"{where}: {feature!r:.60}, must be an object with a dtype")
        shape = feature.get("shape")
        if not isinstance(shape, list) or any(
            type(n) is not int or not 0 <= n < 1 << 31 for n in shape
        ):
            raise FormatError(f"{where}: shape is {shape!r:.60}, must be a list of sizes")
    return features


def _choose(features: Mapping[str, Mapping[str, Any]], wanted: str, path: Path) -> str:
    """Return the feature that is the frame."""
    cameras = [name for name, about in features.items() if about["dtype"] in ("video", "image")]
    if not cameras:
        raise FormatError(f"{path}: no feature is a video or an image, so there are no frames")
    if wanted and wanted not in cameras:
        raise ConfigError(
            f"--lerobot.camera {wanted}: no such camera; there are {', '.join(cameras)}"
        )
    if not wanted and len(cameras) > 1:
        raise ConfigError(
            f"{path}: several cameras, {', '.join(cameras)}; choose one with --lerobot.camera"
        )
    return wanted or cameras[0]


def _episodes_v2(
    folder: Path, info: Mapping[str, Any], video_key: str | None
) -> Iterator[EpisodeEntry]:
    """Yield the episodes of meta/episodes.jsonl."""
    path = folder / "meta" / "info.json"
    chunk = _count(info, "chunks_size", str(path)) if "chunks_size" in info else _CHUNKS_SIZE
    if chunk == 0:
        raise FormatError(f"{path}: chunks_size is 0")
    for where, line in load_lines(folder / "meta" / "episodes.jsonl"):
        number = _count(line, "episode_index", where)
        fields = {"episode_chunk": number // chunk, "episode_index": number}
        yield EpisodeEntry(
            number=number,
            length=_count(line, "length", where),
            tasks=_tasks(line.get("tasks")),
            data=fill_template(info.get("data_path"), fields, where=f"{path}: data_path"),
            first_row=None,
            video=None
            if video_key is None
            else fill_template(
                info.get("video_path"),
                {**fields, "video_key": video_key},
                where=f"{path}: video_path",
            ),
            start_s=0.0,
            whole_video=True,
        )


def _episodes_v3(
    folder: Path, info: Mapping[str, Any], video_key: str | None
) -> Iterator[EpisodeEntry]:
    """Yield the episodes of meta/episodes/chunk-*/file-*.parquet."""
    rows = list(_rows_v3(folder, video_key))
    first_row: dict[str, int] = {}
    path = folder / "meta" / "info.json"
    for where, row in rows:
        row["data"] = fill_template(
            info.get("data_path"), _place(row, "data", where), where=f"{path}: data_path"
        )
        start = _count(row, "dataset_from_index", where)
        first_row[row["data"]] = min(start, first_row.get(row["data"], start))
    for where, row in rows:
        start, stop = (_count(row, f"dataset_{end}_index", where) for end in ("from", "to"))
        length = _count(row, "length", where)
        if stop - start != length:
            raise FormatError(f"{where}: length {length}, but rows {start} to {stop} of the data")
        video, start_s = None, 0.0
        if video_key is not None:
            place = {**_place(row, f"videos/{video_key}", where), "video_key": video_key}
            video = fill_template(info.get("video_path"), place, where=f"{path}: video_path")
            start_s = _seconds(row, f"videos/{video_key}/from_timestamp", where)
        yield EpisodeEntry(
            number=_count(row, "episode_index", where),
            length=length,
            tasks=_tasks(row.get("tasks")),
            data=row["data"],
            first_row=start - first_row[row["data"]],
            video=video,
            start_s=start_s,
            whole_video=False,
        )


def _rows_v3(folder: Path, video_key: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where it stands, and the columns we need, of every row of the index."""
    columns = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    columns += ["data/chunk_index", "data/file_index"]
    if video_key is not None:
        names = ("chunk_index", "file_index", "from_timestamp")
        columns += [f"videos/{video_key}/{name}" for name in names]
    paths = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise FormatError(f"{folder / 'meta' / 'episodes'}: no index (chunk-000/file-000.parquet)")
    for path in paths:
        with ParquetFile(path) as file:
            wanted = [*columns, "tasks"] if "tasks" in file.names else columns
            for first, batch in file.batches(wanted, 0, file.num_rows):
                for i, row in enumerate(batch.to_pylist()):
                    yield f"{path}: row {first + i}", row


def _place(row: Mapping[str, Any], prefix: str, where: str) -> dict[str, int | str]:
    return {
        name: _count(row, f"{prefix}/{name}", where, name=name)
        for name in ("chunk_index", "file_index")
    }


def _count(row: Mapping[str, Any], key: str, where: str, *, name: str = "") -> int:
    value = row.get(key)
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise FormatError(f"{where}: {name or key} is {value!r:.60}, must be a whole number")
    return value


def _seconds(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise FormatError(f"{where}: {key} is {value!r:.60}, must be seconds")
    return float(value)


def _tasks(value: object) -> tuple[str, ...]:
    """Return what the robot was told to do, for people."""
    tasks = value if isinstance(value, list) else []
    return tuple(str(task)[:_MAX_TEXT] for task in tasks[:10])


def _check_numbers(episodes: Sequence[EpisodeEntry], total: object, path: Path) -> None:
    """Refuse an index without episodes, with one twice, or of another size than info.json says."""
    if not episodes:
        raise FormatError(f"{path}: the data set has no episodes")
    for before, after in pairwise(episodes):
        if before.number == after.number:
            raise FormatError(f"{path}: episode {after.number} stands twice in the index")
    if total is not None and total != len(episodes):
        raise FormatError(f"{path}: total_episodes {total!r:.20}, but {len(episodes)} are listed")
