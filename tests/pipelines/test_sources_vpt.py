"""Promises of sources/vpt.py: keys, camera and menus of OpenAI's recordings, quirks included.

VPT's own recorder cannot be installed. The files here have, field for field, what `data_loader.py`
and `run_inverse_dynamics_model.py` of OpenAI's Video-Pre-Training read.
"""

import json
import re
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video_worlds import played, read_frame, read_here, write_video
from worldloom.common import ConfigError, Episodes, FormatError
from worldloom.pipelines.ingest import ingest
from worldloom.pipelines.ingest_config import IngestConfig, VptConfig
from worldloom.pipelines.sources.vpt import open_source
from worldloom.pipelines.sources.vpt_lines import KEYS, read_lines

WASD = ("w", "a", "s", "d", "space")
"""The keys of `played("keys", ...)`, as a keyboard calls them."""
NAMES = ("forward", "left", "back", "right", "jump")
"""The same, as Minecraft calls them."""
STILL = 5
"""The middle one of 11 bins."""


def line(
    *,
    keys: Sequence[str] = (),
    buttons: Sequence[int] = (),
    new: Sequence[int] = (),
    dx: float = 0.0,
    dy: float = 0.0,
    hotbar: int = 0,
    menu: bool = False,
) -> dict[str, Any]:
    """What the recorder writes of one frame."""
    return {
        "mouse": {
            "x": 640.0, "y": 360.0, "dx": dx, "dy": dy, "scaledX": 0.0, "scaledY": 0.0,
            "dwheel": 0.0, "buttons": list(buttons), "newButtons": list(new),
        },
        "keyboard": {"keys": [f"key.keyboard.{key}" for key in keys], "newKeys": [], "chars": ""},
        "isGuiOpen": menu, "isGuiInventory": menu, "hotbar": hotbar, "yaw": 0.0, "pitch": 0.0,
        "xpos": 0.5, "ypos": 64.0, "zpos": 0.5, "tick": 0, "milli": 0, "inventory": [],
        "serverTick": 1, "serverTickDurationMs": 9.5, "stats": {},
    }  # fmt: skip


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def write(folder: Path, name: str, lines: Sequence[dict[str, Any]], *, seed: int = 0) -> Path:
    """Write a recording of as many frames as lines, of a world that shows other keys."""
    folder.mkdir(exist_ok=True)
    write_video(folder / f"{name}.mp4", played("keys", len(lines), seed=seed).frames_THWC)
    write_lines(folder / f"{name}.jsonl", lines)
    return folder


def config(path: Path, output: Path, /, **changes: Any) -> IngestConfig:
    return IngestConfig(**{"kind": "vpt", "path": path, "output": output, **changes})


def read(path: Path, lines: Sequence[dict[str, Any]]) -> list[set[str]]:
    """What is pressed in each line."""
    found = read_lines(write_lines(path, lines))
    return [{name for name, down in zip(KEYS, row, strict=True) if down} for row in found.keys]


def one_episode(settings: IngestConfig) -> Any:
    """Ingest, and return the frames and actions of the only episode."""
    _, answers = read_here(settings)
    with Episodes(settings.output).open(answers[0].key) as opened:
        return opened.frames(0, opened.num_frames), opened.actions


def world_lines(world: Any, *, dots: Sequence[float]) -> list[dict[str, Any]]:
    """The lines of `played("keys", ...)`, with a mouse that moves right; the last leads nowhere."""
    raw = np.concatenate([world.raw, world.raw[:1]])
    return [
        line(keys=[k for k, down in zip(WASD, row, strict=True) if down], dx=dx, dy=-2 * dx)
        for row, dx in zip(raw, dots, strict=True)
    ]


@pytest.mark.parametrize("frame_skip", [1, 3])
@pytest.mark.parametrize("menus", ["keep", "cut"])
def test_every_action_leads_to_the_frame_that_shows_it(tmp_path, frame_skip, menus):
    world = played("keys", 80, seed=4)
    dots = [float(i % 5) for i in range(80)]
    lines = world_lines(world, dots=dots)
    for i in range(30, 33):
        lines[i]["isGuiOpen"] = True
    write_video(tmp_path / "in" / "a.mp4", world.frames_THWC)
    write_lines(tmp_path / "in" / "a.jsonl", lines)
    source, answers = read_here(
        config(tmp_path / "in", tmp_path / "out", frame_skip=frame_skip, vpt=VptConfig(menus=menus))
    )
    firsts = [0, 33] if menus == "cut" else [0]
    assert len(answers) == len(firsts)
    pressed = [KEYS.index(name) for name in NAMES]
    others = [i for i in range(len(KEYS)) if i not in pressed]
    for answer, first in zip(answers, firsts, strict=True):
        with Episodes(tmp_path / "out").open(answer.key) as opened:
            read_frames = [read_frame(frame, 5) for frame in opened.frames()]
            steps = [step for step, _ in read_frames]
            assert steps == list(range(first, steps[-1] + 1, frame_skip))
            slots = world.spec.encode(world.raw)
            assert all(shown == slots[step - 1].tolist() for step, shown in read_frames if step)
            for i, step in enumerate(steps[:-1]):
                between = slice(step, step + frame_skip)
                down = world.raw[between].any(0).astype(int)
                assert opened.actions[i, pressed].tolist() == down.tolist()
                assert not opened.actions[i, others].any()
                yaw = min(10.0, sum(dots[between]) * 360 / 2400)
                pitch = max(-10.0, -2 * sum(dots[between]) * 360 / 2400)
                assert opened.actions[i, -2:].tolist() == [mu_law_bin(pitch), mu_law_bin(yaw)]
    assert source.actions.names == (*KEYS, "camera_pitch", "camera_yaw")


def mu_law_bin(degrees: float, *, bins: int = 11, limit: float = 10.0) -> int:
    """The formula of docs/formats.md, once more."""
    u = degrees / limit
    bent = np.sign(u) * np.log(1 + 255 * abs(u)) / np.log(256)
    return min(bins - 1, int(np.floor((bent + 1) / 2 * bins)))


def test_every_key_and_button_has_its_slot_and_others_are_passed_by(tmp_path):
    keyboard = {
        "escape": "ESC", "s": "back", "q": "drop", "w": "forward", "e": "inventory",
        "space": "jump", "a": "left", "d": "right", "left.shift": "sneak",
        "left.control": "sprint", "f": "swapHands", **{str(i): f"hotbar.{i}" for i in range(1, 10)},
    }  # fmt: skip
    lines = [line(keys=[key]) for key in keyboard]
    lines += [line(buttons=[button]) for button in range(3)]
    lines += [line(keys=["f3", "unknown"], buttons=[3, 7]), line()]
    found = read(tmp_path / "a.jsonl", lines)
    assert found == [{name} for name in keyboard.values()] + [
        {"attack"}, {"use"}, {"pickItem"}, set(), set(),
    ]  # fmt: skip
    assert len(KEYS) == 23


def test_an_attack_that_is_stuck_from_the_first_frame_is_not_pressed_until_pressed_anew(tmp_path):
    stuck = [
        line(buttons=[0], new=[0]), line(buttons=[0, 1], new=[1]), line(buttons=[0]),
        line(buttons=[]), line(buttons=[0], new=[0]), line(buttons=[0]),
    ]  # fmt: skip
    found = read(tmp_path / "a.jsonl", stuck)
    assert found == [set(), {"use"}, set(), set(), {"attack"}, {"attack"}]
    assert read_lines(tmp_path / "a.jsonl").attack_was_stuck
    held = [line(buttons=[0]), line(buttons=[0]), line()]
    assert read(tmp_path / "b.jsonl", held) == [{"attack"}, {"attack"}, set()]
    assert not read_lines(tmp_path / "b.jsonl").attack_was_stuck


def test_the_wheel_presses_the_slot_that_it_selects(tmp_path):
    rows = [line(hotbar=3), line(hotbar=3), line(hotbar=4), line(hotbar=4), line(hotbar=0)]
    found = read(tmp_path / "a.jsonl", rows)
    assert found == [set(), set(), {"hotbar.5"}, set(), {"hotbar.1"}]


def test_steps_in_which_nothing_is_done_stay(tmp_path):
    folder = write(tmp_path / "in", "a", [line() for _ in range(12)])
    frames_THWC, actions = one_episode(config(folder, tmp_path / "out"))
    assert len(frames_THWC) == 12
    assert not actions[:, : len(KEYS)].any()
    assert (actions[:, -2:] == STILL).all()


def test_turns_are_not_truncated_to_whole_degrees_and_are_clipped(tmp_path):
    rows = [line(dx=1.0), line(dx=-1.0, dy=3.0), line(dx=4000.0, dy=-4000.0), line()]
    _, actions = one_episode(config(write(tmp_path / "in", "a", rows), tmp_path / "out"))
    assert actions[:, -2:].tolist() == [
        [STILL, mu_law_bin(0.15)], [mu_law_bin(0.45), mu_law_bin(-0.15)], [0, 10],
    ]  # fmt: skip


def test_the_cameras_bins_and_range_are_settings(tmp_path):
    folder = write(tmp_path / "in", "a", [line(dx=100.0), line()])
    chosen = VptConfig(camera_bins=21, camera_degrees=30)
    source = open_source(folder, config(folder, tmp_path, vpt=chosen))
    assert source.actions.sizes == (2,) * 23 + (21, 21)
    _, actions = one_episode(config(folder, tmp_path / "out", vpt=chosen))
    assert actions[0, -1] == mu_law_bin(15, bins=21, limit=30)
    for wrong in (VptConfig(camera_bins=10), VptConfig(camera_bins=1), VptConfig(camera_degrees=0)):
        with pytest.raises(ConfigError, match=r"--vpt\.camera"):
            open_source(folder, config(folder, tmp_path, vpt=wrong))


@pytest.mark.parametrize(("frames", "lines"), [(20, 17), (17, 20)])
def test_the_shorter_of_video_and_lines_counts(tmp_path, frames, lines):
    world = played("keys", frames)
    write_video(tmp_path / "in" / "a.mp4", world.frames_THWC)
    write_lines(tmp_path / "in" / "a.jsonl", [line(dx=float(i)) for i in range(lines)])
    frames_THWC, actions = one_episode(config(tmp_path / "in", tmp_path / "out"))
    assert len(frames_THWC) == 17
    assert actions[:, -1].tolist() == [mu_law_bin(i * 0.15) for i in range(16)]


def test_frames_under_a_menu_are_kept_and_counted(tmp_path):
    rows = [line(menu=4 <= i < 9) for i in range(30)]
    folder = write(tmp_path / "in", "a", rows)
    read_here(config(folder, tmp_path / "out"))
    with Episodes(tmp_path / "out").open("a") as opened:
        assert opened.num_frames == 30
        assert opened.metadata["menu_frames"] == 5


def test_stretches_under_a_second_between_menus_are_left_out(tmp_path):
    menus = [*range(25), *range(44, 50)]
    folder = write(tmp_path / "in", "a", [line(menu=i in menus) for i in range(75)])
    cut = config(folder, tmp_path, vpt=VptConfig(menus="cut"))
    origins = [r.origin for r in open_source(folder, cut).recordings]
    assert origins == ["a.mp4: frames 50 to 74"]


def test_recordings_come_in_the_order_of_their_names_with_keys_that_are_safe(tmp_path):
    for name in ("b", "a.2021.x", "a b", "sub/c"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / "in" / f"{name}.jsonl", [line()])
    recordings = open_source(tmp_path / "in", config(tmp_path / "in", tmp_path)).recordings
    names = [r.origin for r in recordings]
    assert names == ["a b.mp4", "a.2021.x.mp4", "b.mp4", "sub/c.mp4"]
    assert len({r.key for r in recordings}) == 4


BROKEN = {
    "": "has no lines; expected one a frame",
    "{}\n": "line 1: mouse is None, must be an object",
    "[1]\n": r"line 1: expected an object, got \[1\]",
    "nonsense": "line 1: cannot be read as JSON",
    json.dumps(line()) + "\n" + json.dumps(line())[:50]: "line 2: cannot be read as JSON",
    json.dumps(line()) + "\n\n" + json.dumps(line()): "line 2: cannot be read as JSON",
    json.dumps(line(hotbar=9)): "line 1: hotbar is 9, must be 0 to 8",
    json.dumps({**line(), "isGuiOpen": 1}): "line 1: isGuiOpen is 1, must be true or false",
    json.dumps(
        {**line(), "keyboard": {"keys": [1]}}
    ): r"line 1: keys is \[1\], must be a list of str",
    json.dumps(line(dx=float("nan"))): "line 1: cannot be read as JSON",
    json.dumps(line(dx=1e300)): r"line 1: mouse dx is 1e\+300, must be a number",
    json.dumps(line(buttons=["0"])): r"line 1: buttons is \['0'\], must be a list of int",
    " " * (1 << 20) + json.dumps(line()): "line 1: more than 1048576 bytes in one line",
}


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_malformed_line_is_refused_with_file_and_line(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(FormatError, match=BROKEN[content]) as refused:
        read_lines(path)
    assert str(refused.value).startswith(str(path))


def spoil(folder: Path, what: str) -> None:
    if what == "cut video":
        content = (folder / "a.mp4").read_bytes()
        (folder / "a.mp4").write_bytes(content[: len(content) // 2])
    elif what == "no video":
        (folder / "a.mp4").unlink()
    elif what == "no lines":
        (folder / "a.jsonl").unlink()
    elif what == "bad line":
        (folder / "a.jsonl").write_text(json.dumps(line()) + "\n{")
    elif what == "rate":
        write_video(folder / "a.mp4", played("keys", 30).frames_THWC, fps=30)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("cut video", r"a\.mp4: .*cut short"),
        ("no video", r"a\.mp4: not found"),
        ("no lines", r"a\.jsonl: not found"),
        ("bad line", r"a\.jsonl: line 2"),
        ("rate", r"a\.mp4: 30 frames a second, but VPT records 20"),
    ],
)
@pytest.mark.parametrize("menus", ["keep", "cut"])
def test_a_broken_recording_is_named_and_the_others_are_read(tmp_path, what, reason, menus):
    folder = write(tmp_path / "in", "a", [line() for _ in range(30)])
    write(folder, "b", [line() for _ in range(30)])
    spoil(folder, what)
    _, answers = read_here(config(folder, tmp_path / "out", vpt=VptConfig(menus=menus)))
    reasons = [answer.reason for answer in answers if hasattr(answer, "reason")]
    assert len(answers) == 2
    assert len(reasons) == 1
    assert re.search(reason, reasons[0]), reasons


def test_skip_bad_counts_broken_recordings(tmp_path, capsys):
    folder = write(tmp_path / "in", "a", [line() for _ in range(4)])
    write(folder, "b", [line() for _ in range(4)])
    spoil(folder, "bad line")
    with pytest.raises(FormatError, match=r"a\.jsonl: line 2"):
        ingest(config(folder, tmp_path / "out"))
    ingest(config(folder, tmp_path / "out", skip_bad=1))
    assert Episodes(tmp_path / "out").keys == ["b"]
    assert "a.jsonl: line 2" in capsys.readouterr().err


@pytest.mark.parametrize("menus", ["keep", "cut"])
def test_another_rate_is_taken_as_it_comes_where_it_is_given(tmp_path, menus):
    world = played("keys", 60)
    write_video(tmp_path / "in" / "a.mp4", world.frames_THWC, fps=30)
    write_lines(tmp_path / "in" / "a.jsonl", [line(menu=i == 30) for i in range(60)])
    chosen = config(tmp_path / "in", tmp_path / "out", fps=10.0, vpt=VptConfig(menus=menus))
    _, answers = read_here(chosen)
    assert Episodes(tmp_path / "out").spec.fps == 10
    with Episodes(tmp_path / "out").open(answers[-1].key) as opened:
        steps = [read_frame(frame, 5)[0] for frame in opened.frames()]
    assert steps == list(range(31 if menus == "cut" else 0, 60))


def test_a_folder_without_recordings_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"has no recordings, NAME\.mp4 beside"):
        open_source(tmp_path, config(tmp_path, tmp_path))
    with pytest.raises(FormatError, match="no such folder"):
        open_source(tmp_path / "x", config(tmp_path / "x", tmp_path))


def test_a_file_of_lines_is_never_held_whole(tmp_path):
    row = json.dumps({**line(keys=["w"]), "inventory": [{"type": "dirt", "quantity": 3}] * 100})
    path = tmp_path / "a.jsonl"
    path.write_text((row + "\n") * 1500)
    tracemalloc.start()
    lines = read_lines(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lines) == 1500
    assert peak < path.stat().st_size / 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ["mouse", "keyboard", "hotbar", "isGuiOpen", "keys", "buttons", "newButtons", "dx", "dy"]


@pytest.mark.slow
@settings(max_examples=300)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), cut=st.integers(0, 999))
def test_any_line_is_read_or_refused(tmp_path_factory, changes, cut):
    row = line(keys=["w"], buttons=[0], dx=3.0)
    tables = [row["mouse"], row["keyboard"], row]
    for name, value in changes.items():
        next(table for table in tables if name in table)[name] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_text(json.dumps(line()) + "\n" + json.dumps(row)[: cut or None])
    with suppress(FormatError):
        assert len(read_lines(path)) == 2


@settings(max_examples=500)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_lines_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(content)
    with suppress(FormatError):
        read_lines(path)
