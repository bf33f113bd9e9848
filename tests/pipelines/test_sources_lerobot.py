"""Promises of sources/lerobot.py: v2.1 and v3.0, with every action before the frame it leads to."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot_writer import CAMERA, FPS, LerobotWriter, png
from video_worlds import assert_aligned, played, read_here, write_video
from worldloom.common import ConfigError, Episodes, FormatError
from worldloom.pipelines.ingest import ingest
from worldloom.pipelines.ingest_config import IngestConfig, LerobotConfig
from worldloom.pipelines.sources.lerobot import open_source
from worldloom.pipelines.sources.lerobot_index import fill_template, read_index

VERSIONS = ("v2.1", "v3.0")


def config(path: Path, output: Path, /, **changes: Any) -> IngestConfig:
    return IngestConfig(**{"kind": "lerobot", "path": path, "output": output, **changes})


def worlds(kind: str, *lengths: int) -> list[Any]:
    return [played(kind, length, seed=seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("images", [False, True], ids=["video", "images"])
@pytest.mark.parametrize("frame_skip", [1, 3])
@pytest.mark.parametrize("kind", ["discrete", "keys", "multi_discrete", "continuous"])
def test_every_action_leads_to_the_frame_that_shows_it(tmp_path, version, images, frame_skip, kind):
    played_worlds = worlds(kind, 24, 9, 40)
    folder = LerobotWriter(version, played_worlds, images=images).write(tmp_path / "in")
    source, _ = read_here(config(folder, tmp_path / "out", frame_skip=frame_skip))
    episodes = Episodes(tmp_path / "out")
    assert episodes.keys == [f"episode-{i:06d}" for i in range(3)]
    assert (episodes.spec.fps, source.actions.kind) == (FPS / frame_skip, kind)
    for key, world in zip(episodes.keys, played_worlds, strict=True):
        with episodes.open(key) as opened:
            assert_aligned(opened, world, frame_skip=frame_skip)
            assert opened.metadata["tasks"] == ["push"]
            assert opened.rewards is None


@pytest.mark.parametrize("version", VERSIONS)
def test_rewards_stand_beside_the_action_that_earned_them(tmp_path, version):
    writer = LerobotWriter(version, worlds("discrete", 5, 7), rewards=True)
    read_here(config(writer.write(tmp_path / "in"), tmp_path / "out"))
    with Episodes(tmp_path / "out").open("episode-000001") as opened:
        assert opened.rewards.tolist() == (0.5 * np.arange(6)).tolist()


def test_frames_alone_can_be_taken(tmp_path):
    folder = LerobotWriter("v3.0", worlds("discrete", 5, 7)).write(tmp_path / "in")
    frames_alone = config(folder, tmp_path / "out", lerobot=LerobotConfig(action=""))
    source, _ = read_here(frames_alone)
    assert source.actions.kind == "none"
    assert "without actions" in source.alignment
    with Episodes(tmp_path / "out").open("episode-000001") as opened:
        assert opened.actions.shape == (6, 0)


def test_the_camera_is_asked_for_where_there_are_several(tmp_path):
    other = {"observation.images.wrist": {"dtype": "video", "shape": [64, 64, 3], "names": None}}
    folder = LerobotWriter("v2.1", worlds("discrete", 5), features=other).write(tmp_path / "in")
    with pytest.raises(
        ConfigError,
        match=rf"{CAMERA}, observation\.images\.wrist; choose one with --lerobot\.camera",
    ):
        open_source(folder, config(folder, tmp_path))
    with pytest.raises(ConfigError, match=rf"no such camera; there are {CAMERA}"):
        open_source(folder, config(folder, tmp_path, lerobot=LerobotConfig(camera="top")))
    chosen = config(folder, tmp_path / "out", lerobot=LerobotConfig(camera=CAMERA))
    assert not hasattr(read_here(chosen)[1][0], "reason")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["x", "y"], ("x", "y")),
        ({"motors": ["x", "y"]}, ("x", "y")),
        ({"y": 1, "x": 0}, ("x", "y")),
        (None, ("AXIS_0", "AXIS_1")),
        (["x"], ("AXIS_0", "AXIS_1")),
        (["x", "x"], ("AXIS_0", "AXIS_1")),
        ({"x": [1], "y": {}}, ("AXIS_0", "AXIS_1")),
    ],
)
def test_names_of_the_axes_come_from_the_features(tmp_path, names, found):
    action = {"action": {"dtype": "float32", "shape": [2], "names": names}}
    writer = LerobotWriter("v2.1", worlds("continuous", 5), features=action)
    folder = writer.write(tmp_path / "in")
    assert open_source(folder, config(folder, tmp_path)).actions.names == found


@pytest.mark.parametrize("version", VERSIONS)
def test_bounds_are_those_of_all_episodes_and_settings_come_first(tmp_path, version):
    folder = LerobotWriter(version, worlds("continuous", 5, 9)).write(tmp_path / "in")
    if version == "v2.1":
        lines = (folder / "meta" / "episodes_stats.jsonl").read_text().splitlines()
        first = json.loads(lines[0])
        first["stats"]["action"] |= {"min": [-5.0, 0.0], "max": [0.5, 0.5]}
        (folder / "meta" / "episodes_stats.jsonl").write_text(json.dumps(first) + "\n" + lines[1])
    spec = open_source(folder, config(folder, tmp_path)).actions
    assert (spec.low, spec.high) == (((-5 if version == "v2.1" else -1), -2), (1, 2))
    given = LerobotConfig(low=(-7,), high=(7, 8), bins=5)
    spec = open_source(folder, config(folder, tmp_path, lerobot=given)).actions
    assert (spec.low, spec.high, spec.sizes) == ((-7, -7), (7, 8), (5, 5))


def test_an_axis_that_never_moved_has_bins_around_its_value(tmp_path):
    stats = {"min": [0.25, -2], "max": [0.25, 2]}
    folder = LerobotWriter("v3.0", worlds("continuous", 5), stats=stats).write(tmp_path / "in")
    spec = open_source(folder, config(folder, tmp_path)).actions
    assert (spec.low, spec.high) == ((-0.75, -2), (1.25, 2))
    assert spec.encode(np.array([[0.25, 0]])).tolist() == [[5, 5]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kind", "flag"), [("continuous", r"--lerobot\.low"), ("discrete", r"--lerobot\.sizes")]
)
def test_without_statistics_the_bounds_are_asked_for(tmp_path, version, kind, flag):
    folder = LerobotWriter(version, worlds(kind, 5), stats=None).write(tmp_path / "in")
    with pytest.raises(ConfigError, match=rf"no statistics of 'action'.*{flag}"):
        open_source(folder, config(folder, tmp_path))
    given = LerobotConfig(low=(-3,), high=(3,), sizes=(9,))
    source, answers = read_here(config(folder, tmp_path / "out", lerobot=given))
    assert source.actions.sizes == ((11, 11) if kind == "continuous" else (9,))
    assert not hasattr(answers[0], "reason")


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_table(path: Path, column: str, change: Callable[[list[Any]], None]) -> None:
    """Rewrite one column of a parquet file."""
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    change(values)
    place = table.schema.get_field_index(column)
    table = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
    pq.write_table(table, path, row_group_size=7)


def data_path(folder: Path, version: str) -> Path:
    name = "episode_000000" if version == "v2.1" else "file-000"
    return folder / "data" / "chunk-000" / f"{name}.parquet"


def video_path(folder: Path, version: str) -> Path:
    if version == "v2.1":
        return folder / "videos" / "chunk-000" / CAMERA / "episode_000000.mp4"
    return folder / "videos" / CAMERA / "chunk-000" / "file-000.mp4"


def spoil(folder: Path, version: str, what: str, frames_THWC: Any) -> None:
    """Break the first episode, and what shares its file."""
    data, video = data_path(folder, version), video_path(folder, version)
    if what == "no data":
        data.unlink()
    elif what == "no video":
        video.unlink()
    elif what == "cut data":
        data.write_bytes(data.read_bytes()[:-20])
    elif what == "cut video":
        video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    elif what == "frame less":
        write_video(video, frames_THWC[:-1], fps=FPS)
    elif what == "frame more":
        write_video(video, np.concatenate([frames_THWC, frames_THWC[:1]]), fps=FPS)
    elif what == "rate":
        write_video(video, frames_THWC, fps=30)
    elif what == "row less":
        pq.write_table(pq.read_table(data)[:-1], data)
    elif what == "nan":
        change_table(data, "action", lambda rows: rows.__setitem__(2, [float("nan"), 0.0]))
    elif what == "range":
        change_table(data, "action", lambda rows: rows.__setitem__(2, [0.0, 9.0]))
    elif what == "null":
        change_table(data, "action", lambda rows: rows.__setitem__(2, None))
    elif what == "text":
        table = pq.read_table(data)
        words = pa.array(["left"] * len(table))
        pq.write_table(table.drop_columns(["action"]).append_column("action", words), data)
    elif what == "no action":
        pq.write_table(pq.read_table(data).drop_columns(["action"]), data)
    elif what == "other episode":
        change_table(data, "episode_index", lambda rows: rows.__setitem__(3, 8))
    elif what == "order":
        change_table(data, "frame_index", lambda rows: rows.__setitem__(3, 2))


BROKEN = {
    "no data": r"\.parquet: no such file",
    "no video": r"\.mp4: not found",
    "cut data": r"\.parquet: cannot be read as parquet",
    "cut video": r"\.mp4: .*cut short",
    "frame less": r"(\.mp4: 11 frames, but 12 rows)|(ends after .* frames .*cut short)",
    "frame more": r"\.mp4: 13 frames, but 12 rows",
    "rate": r"\.mp4: 30 frames a second, but 20 in .*info\.json",
    "row less": r"(11 rows, but the index says 12)|(20 rows, but row 20 is wanted)",
    "nan": r"episode 0: action: step 2 has nan on axis steer",
    "range": r"action: step 2 has 9\.0 on axis gas, must be in \[-2\.0, 2\.0\]; .*--lerobot\.low",
    "null": r"action from row \d+ on: a value is missing",
    "text": r"action from row \d+ on: string, expected numbers",
    "no action": r"has no column 'action'; there are timestamp",
    "other episode": r"episode 0: row 3 has episode_index 8, but the index says 0",
    "order": r"episode 0: row 3 has frame_index 2, but the index says 3",
}


# In v3 many episodes share a video, which may go on after the last of them.
@pytest.mark.parametrize(
    ("version", "what"),
    [(v, what) for v in VERSIONS for what in BROKEN if (v, what) != ("v3.0", "frame more")],
)
def test_a_broken_episode_is_named_and_the_others_are_read(tmp_path, version, what):
    played_worlds = worlds("continuous", 12, 9, 10)
    folder = LerobotWriter(version, played_worlds).write(tmp_path / "in")
    shared = played_worlds[: 1 if version == "v2.1" else 2]
    spoil(folder, version, what, np.concatenate([world.frames_THWC for world in shared]))
    _, answers = read_here(config(folder, tmp_path / "out"))
    reasons = [answer.reason for answer in answers if hasattr(answer, "reason")]
    assert reasons
    assert len(reasons) <= len(shared)
    assert all(re.search(BROKEN[what], reason) for reason in reasons), reasons


def test_skip_bad_counts_broken_episodes(tmp_path, capsys):
    folder = LerobotWriter("v2.1", worlds("continuous", 12, 9)).write(tmp_path / "in")
    spoil(folder, "v2.1", "nan", None)
    with pytest.raises(FormatError, match="step 2 has nan"):
        ingest(config(folder, tmp_path / "out"))
    ingest(config(folder, tmp_path / "out", skip_bad=1))
    assert Episodes(tmp_path / "out").keys == ["episode-000001"]
    assert "step 2 has nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"bytes": b"no picture", "path": None}, r"row 2: not a PNG or JPEG"),
        ({"bytes": None, "path": "frame.png"}, r"row 2: has no bytes of a picture"),
        ({"bytes": png(np.zeros((64, 63, 3), np.uint8)), "path": None},
         r"row 2: RGB of 64x63, expected RGB of 64x64"),
        ({"bytes": png(np.zeros((64, 64), np.uint16)), "path": None}, r"row 2: I;16 of 64x64"),
    ],
)  # fmt: skip
def test_a_row_without_its_picture_is_named(tmp_path, value, reason):
    folder = LerobotWriter("v3.0", worlds("discrete", 6), images=True).write(tmp_path / "in")
    change_table(data_path(folder, "v3.0"), CAMERA, lambda rows: rows.__setitem__(2, value))
    _, answers = read_here(config(folder, tmp_path / "out"))
    assert re.search(reason, answers[0].reason), answers


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (
            {"codebase_version": "v1.6"},
            r"codebase_version 'v1\.6'; v2\.0, v2\.1 and v3\.0 are read",
        ),
        ({"fps": 0}, "fps is 0, must be a positive number"),
        ({"fps": "30"}, "fps is '30'"),
        ({"total_episodes": 3}, "total_episodes 3, but 1 are listed"),
        ({"features": []}, r"features is \[\], must be an object"),
        ({"features": {CAMERA: {"dtype": "video"}}}, "shape is None"),
        ({"features": {"action": {"dtype": "float32", "shape": [2]}}}, "no feature is a video"),
        ({"data_path": None}, "data_path: the template None must be a path"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_index_that_is_not_lerobots_is_refused(tmp_path, version, info, reason):
    folder = LerobotWriter(version, worlds("discrete", 5), info=info).write(tmp_path / "in")
    with pytest.raises(FormatError, match=reason):
        open_source(folder, config(folder, tmp_path))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_action_that_no_spec_describes_is_refused(tmp_path, version):
    for number, (action, reason) in enumerate(
        [
            ({"dtype": "float32", "shape": [2, 7]}, r"shape \[2, 7\], must be one row"),
            ({"dtype": "float32", "shape": [0]}, r"shape \[0\], must be one row"),
            ({"dtype": "float32", "shape": [999]}, r"shape \[999\], must be one row"),
            ({"dtype": "string", "shape": [1]}, "dtype 'string', read are floats"),
        ]
    ):
        writer = LerobotWriter(version, worlds("continuous", 5), features={"action": action})
        folder = writer.write(tmp_path / str(number))
        with pytest.raises(FormatError, match=reason):
            open_source(folder, config(folder, tmp_path))
    with pytest.raises(ConfigError, match=r"no such feature .*did you mean 'action'"):
        open_source(folder, config(folder, tmp_path, lerobot=LerobotConfig(action="acton")))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_empty_data_set_and_an_episode_twice_are_refused(tmp_path, version):
    folder = LerobotWriter(version, worlds("discrete", 5, 5)).write(tmp_path / "in")
    lines = folder / "meta" / "episodes.jsonl"
    table = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    if version == "v2.1":
        lines.write_text(lines.read_text().replace('"episode_index": 1', '"episode_index": 0'))
    else:
        change_table(table, "episode_index", lambda rows: rows.__setitem__(1, 0))
    with pytest.raises(FormatError, match="episode 0 stands twice"):
        open_source(folder, config(folder, tmp_path))
    lines.write_text("") if version == "v2.1" else pq.write_table(pq.read_table(table)[:0], table)
    with pytest.raises(FormatError, match="no episodes"):
        open_source(folder, config(folder, tmp_path))
    with pytest.raises(FormatError, match=r"info\.json: not found"):
        open_source(tmp_path, config(tmp_path, tmp_path))


FIELDS = {"episode_chunk": 0, "episode_index": 12, "video_key": "observation.images.top"}


def test_the_templates_of_lerobot_give_its_paths():
    path = fill_template(
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        FIELDS,
        where="test",
    )
    assert path == "videos/chunk-000/observation.images.top/episode_000012.mp4"


@pytest.mark.parametrize(
    "template",
    [
        "../{episode_index}.mp4", "/etc/passwd", "a/../../b", "..", "", "a\\..\\b", "a\0b",
        "{video_key.__class__}", "{video_key[0]}", "{episode_index.__init__}", "{episode_index!r}",
        "{episode_index:>999999999}", "{episode_index:{episode_chunk}}", "{video_key:99}",
        "{other}", "{}", "{0}", "{episode_index", "}", None, 7, ["x"], "x" * 2000,
    ],
)  # fmt: skip
def test_a_template_that_leads_elsewhere_or_asks_for_more_is_refused(template):
    with pytest.raises(FormatError, match=r"^test: the template"):
        fill_template(template, FIELDS, where="test")


def test_a_camera_whose_name_is_a_path_stays_in_the_folder(tmp_path):
    camera = {"../../../etc/hosts": {"dtype": "video", "shape": [64, 64, 3], "names": None}}
    folder = LerobotWriter("v2.1", worlds("discrete", 5), features=camera).write(tmp_path / "in")
    chosen = LerobotConfig(camera="../../../etc/hosts")
    with pytest.raises(FormatError, match="does not stay in the folder"):
        open_source(folder, config(folder, tmp_path, lerobot=chosen))


def test_a_claim_of_many_rows_costs_no_memory(tmp_path):
    folder = LerobotWriter("v2.1", worlds("discrete", 5)).write(tmp_path / "in")
    path = folder / "meta" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 5', '"length": 99999999999'))
    _, answers = read_here(config(folder, tmp_path / "out"))
    assert "5 rows, but the index says 99999999999" in answers[0].reason


MEMORY = """
import sys
from pathlib import Path
import pyarrow
from worldloom.pipelines.ingest_config import IngestConfig
from worldloom.pipelines.sources.lerobot import open_source
path = Path(sys.argv[1])
source = open_source(path, IngestConfig(kind="lerobot", path=path, output=path))
with source.open(source.recordings[0]) as opened:
    count = sum(1 for _ in opened.frames())
    opened.actions(count)
print(count, pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows_of_a_file(tmp_path):
    world = played("discrete", 3000)
    world.frames_THWC[:] = np.random.default_rng(0).integers(0, 256, (3000, 64, 64, 3), np.uint8)
    writer = LerobotWriter("v3.0", [world], images=True, row_group=10_000)
    folder = writer.write(tmp_path / "in")
    assert data_path(folder, "v3.0").stat().st_size > 30e6
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True
    )
    count, most_bytes = map(int, ran.stdout.split())
    assert (count, most_bytes < 8e6) == (3000, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FEATURE = (
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["video", "image", "float32", "int64", "bool"]) | JSON,
            "shape": st.lists(st.integers(-1, 300), max_size=3) | JSON,
        },
        optional={"names": JSON},
    )
    | JSON
)
INFO = st.fixed_dictionaries(
    {
        "codebase_version": st.sampled_from(["v2.1", "v2.0", "v3.0"]) | JSON,
        "fps": st.integers() | JSON,
        "features": st.dictionaries(
            st.sampled_from(["action", CAMERA, "x"]), FEATURE, min_size=1, max_size=3
        )
        | JSON,
        "data_path": st.text(max_size=30) | JSON,
        "video_path": st.text(max_size=30) | JSON,
    },
    optional={"total_episodes": JSON, "chunks_size": JSON},
)
LINES = st.lists(
    st.fixed_dictionaries(
        {"episode_index": st.integers(-1, 3) | JSON, "length": st.integers() | JSON},
        optional={"tasks": JSON, "stats": JSON},
    )
    | JSON,
    max_size=3,
)


@pytest.mark.slow
@settings(max_examples=300)
@given(info=INFO, lines=LINES, cut=st.integers(0, 400))
def test_any_index_is_read_or_refused(tmp_path_factory, info, lines, cut):
    meta = tmp_path_factory.getbasetemp() / "fuzzed" / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in lines)
    (meta / "info.json").write_text(json.dumps(info)[: cut or None])
    (meta / "episodes.jsonl").write_text(text)
    (meta / "episodes_stats.jsonl").write_text(text)
    for camera in ("", CAMERA):
        with suppress(FormatError, ConfigError):
            read_index(meta.parent, camera=camera)
    with suppress(FormatError, ConfigError):
        open_source(meta.parent, config(meta.parent, meta, lerobot=LerobotConfig(camera=CAMERA)))


ACTION = {
    "codebase_version": "v2.1", "fps": 10, "data_path": "d", "video_path": "v",
    "features": {CAMERA: {"dtype": "video", "shape": [8, 8, 3]}},
}  # fmt: skip


@settings(max_examples=200)
@given(action=FEATURE, low=st.lists(st.floats(), max_size=3) | JSON, high=JSON)
def test_any_statistics_are_read_or_refused(tmp_path_factory, action, low, high):
    meta = tmp_path_factory.getbasetemp() / "fuzzed stats" / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    info = {**ACTION, "features": {**ACTION["features"], "action": action}}
    (meta / "info.json").write_text(json.dumps(info))
    (meta / "episodes.jsonl").write_text(json.dumps({"episode_index": 0, "length": 3}))
    (meta / "stats.json").write_text(json.dumps({"action": {"min": low, "max": high}}))
    with suppress(FormatError, ConfigError):
        open_source(meta.parent, config(meta.parent, meta))


PARTS = st.sampled_from(
    ["..", "/", "a", ".", "{episode_index}", "{episode_index:06d}", "{video_key}", "{", "}", ":",
     "{episode_index:9", "{video_key.", "!r", "[0]", "\\", "\0"]
)  # fmt: skip


@settings(max_examples=1000)
@given(template=st.lists(PARTS | st.text(max_size=3), max_size=6).map("".join))
def test_any_template_gives_a_path_inside_or_is_refused(template):
    with suppress(FormatError):
        path = Path("/data") / fill_template(template, FIELDS, where="test")
        assert Path("/data") in path.parents
        assert len(str(path)) < 5000


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'worldloom\[ingest\]'"):
        open_source(tmp_path, config(tmp_path, tmp_path))
