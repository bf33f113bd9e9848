import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ACTION_SPECS
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import ActionSpec, FormatError, StorageError
from worldloom.dynamics import NULL, SamplingConfig
from worldloom.pipelines.action_sources import written_actions
from worldloom.pipelines.generate import GenerateConfig, generate
from worldloom.pipelines.play.recording import Recording
from worldloom.pipelines.starts import Moment, read_start
from worldloom.pipelines.video_files import VideoFile
from worldloom.pipelines.world import World

DISCRETE = ACTION_SPECS["discrete"]


def some_frames(count, height=16, width=24, seed=0):
    """Plain frames, each of one colour: what a codec keeps almost exactly."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 1, 1, 3))
    return np.broadcast_to(colours, (count, height, width, 3)).astype(np.uint8)


def recording(folder, *, spec=DISCRETE, fps=8.75, first_HWC=None, name="stretch"):
    first_HWC = some_frames(1)[0] if first_HWC is None else first_HWC
    return Recording(folder, name, spec=spec, fps=fps, first_HWC=first_HWC)


def actions_of(folder, steps, *, spec=DISCRETE):
    """Record steps, and read the written actions as generate does."""
    with recording(folder, spec=spec) as stretch:
        for slots_rA in steps:
            stretch.add(some_frames(len(slots_rA)), slots_rA)
    return written_actions(str(stretch.actions), spec=spec)


def test_the_actions_of_a_recording_make_generate_give_the_codes_that_were_played(
    tiny_chain, tmp_path
):
    world = World(tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig(temperature=1.0))
    moment = Moment(episode="0", start_frame=0, prompt_frames=3)
    start = read_start(tiny_chain.folder / "shards", world, moment)
    frames_THWC = world.reset(start.codes_thw, start.slots_TA, seed=5)
    played, steps = [], [[1], [1], [NULL], [2], [2], [2], [0]]
    with Recording(
        tmp_path, "k", spec=world.model.spec.actions, fps=8.75, first_HWC=frames_THWC[-1]
    ) as stretch:
        for slots in steps:
            slots_rA = np.array([slots])
            frames_THWC, codes_hw = world.step(slots_rA)
            stretch.add(frames_THWC, slots_rA)
            played.append(codes_hw.numpy())
    output = generate(
        GenerateConfig(
            **tiny_chain.paths,
            start=tiny_chain.folder / "shards",
            prompt_frames=3,
            actions=str(stretch.actions),
            seed=5,
            sampling=SamplingConfig(temperature=1.0),
            output=tmp_path / "generated",
        )
    )
    with np.load(output / "codes.npz") as saved:
        assert saved["actions"].tolist() == steps
        assert np.array_equal(saved["codes"][0][3:], np.stack(played))


def test_the_video_shows_every_frame_in_order_at_the_worlds_pace(tmp_path):
    frames_THWC = some_frames(9)
    with recording(tmp_path, first_HWC=frames_THWC[0]) as stretch:
        for at in range(1, 9, 2):
            stretch.add(frames_THWC[at : at + 2], np.zeros((2, 1), np.int64))
    with VideoFile(stretch.mp4) as video:
        shown = list(video.frames())
        assert video.fps == 8.75
    assert stretch.frames == len(shown) == 9
    for frame_HWC, seen in zip(frames_THWC, shown, strict=True):
        assert np.abs(seen.astype(int) - frame_HWC[0, 0]).max() <= 6


@pytest.mark.parametrize(("height", "width"), [(16, 24), (15, 21), (301, 301), (700, 90)])
def test_frames_are_enlarged_by_whole_factors_and_odd_sides_lose_nothing(tmp_path, height, width):
    first_HWC = np.zeros((height, width, 3), np.uint8)
    first_HWC[-1, -1] = 255
    with recording(tmp_path, first_HWC=first_HWC) as stretch:
        pass
    with VideoFile(stretch.mp4) as video:
        (shown,) = video.frames()
    times = max(1, 512 // max(height, width))
    assert shown.shape == (-(-height * times // 2) * 2, -(-width * times // 2) * 2, 3)
    lit = np.argwhere(shown.max(axis=2) > 128)
    # One pixel of chroma is four of luma, so that the edge of a single one may blur by one.
    assert abs(lit.min(axis=0) - [(height - 1) * times, (width - 1) * times]).max() <= 1
    assert (lit.max(axis=0) == np.array(shown.shape[:2]) - 1).all()


@pytest.mark.parametrize("kind", sorted(ACTION_SPECS))
def test_actions_of_every_kind_are_read_back_as_they_were_played(tmp_path, kind):
    spec = ACTION_SPECS[kind]
    rng = np.random.default_rng(3)
    slots_TA = rng.integers(0, np.asarray(spec.sizes, np.int64), (30, spec.num_slots))
    if kind == "keys":
        slots_TA = np.stack([[0, 0], [1, 3], [2, 0], [2, 4], [2, 4]])
    null_A = np.full_like(slots_TA[:1], NULL)
    slots_TA = np.concatenate([slots_TA, null_A, null_A, slots_TA[:2]])
    read_TA = actions_of(tmp_path, [slots_TA[:4], slots_TA[4:]], spec=spec)
    assert np.array_equal(read_TA, slots_TA)


AWKWARD = st.one_of(
    st.text(max_size=4), st.text("ab01+* ,;", max_size=3), st.sampled_from(["null", "none"])
)


@settings(max_examples=40)
@given(
    names=st.lists(AWKWARD, min_size=1, max_size=5, unique=True),
    keys=st.booleans(),
    values=st.lists(st.integers(NULL, 4), min_size=1, max_size=9),
)
def test_whatever_a_game_calls_its_actions_they_read_back_or_are_refused(
    tmp_path_factory, names, keys, values
):
    spec = ActionSpec.keys(names, max_keys=1) if keys else ActionSpec.discrete(names)
    steps = [np.array([[min(value, len(names) - 1)]]) for value in values]
    said, read_TA = "", None
    try:
        read_TA = actions_of(tmp_path_factory.mktemp("odd"), steps, spec=spec)
    except FormatError as error:
        said = str(error)
    if read_TA is None:
        assert "cannot be written as words" in said
        assert any(set(name) & set("+*") or name.strip().isdigit() or name == "null"
                   for name in names)  # fmt: skip
    else:
        assert np.array_equal(read_TA, np.concatenate(steps))


def test_equal_actions_are_one_word_a_person_can_read(tmp_path):
    actions_of(tmp_path, [np.array([[1]])] * 12 + [np.array([[NULL]])] * 3 + [np.array([[2]])])
    words = json.loads((tmp_path / "stretch.json").read_text())
    assert words == ["left*12", "null*3", "right*1"]


def test_a_recording_of_no_step_is_one_frame_and_an_empty_list(tmp_path):
    with recording(tmp_path) as stretch:
        pass
    assert json.loads(stretch.actions.read_text()) == []
    with VideoFile(stretch.mp4) as video:
        assert len(list(video.frames())) == 1


def test_a_world_that_does_not_know_its_pace_is_recorded_at_ten_frames_a_second(tmp_path):
    with recording(tmp_path, fps=0.0) as stretch:
        stretch.add(some_frames(2), np.zeros((2, 1), np.int64))
    with VideoFile(stretch.mp4) as video:
        assert video.fps == 10


def test_closing_twice_leaves_the_files_as_they_are(tmp_path):
    stretch = recording(tmp_path)
    stretch.close()
    content = stretch.actions.read_bytes(), stretch.mp4.read_bytes()
    stretch.close()
    assert (stretch.actions.read_bytes(), stretch.mp4.read_bytes()) == content


def test_what_a_killed_process_leaves_plays_up_to_its_last_frames(tmp_path):
    frames_THWC = some_frames(40)
    pid = os.fork()
    if pid == 0:
        try:
            stretch = recording(tmp_path, first_HWC=frames_THWC[0])
            for frame_HWC in frames_THWC[1:]:
                stretch.add(frame_HWC[None], np.zeros((1, 1), np.int64))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    with VideoFile(tmp_path / "stretch.mp4") as video:
        assert len(list(video.frames(num_frames=39))) == 39


def test_the_files_grow_as_it_is_played_and_memory_does_not(tmp_path):
    rng = np.random.default_rng(0)
    noise_THWC = rng.integers(0, 256, (8, 300, 40, 3), np.uint8)
    sizes, resident = [], []
    with recording(tmp_path, first_HWC=noise_THWC[0]) as stretch:
        for step in range(400):
            stretch.add(noise_THWC[step % 8][None], np.array([[step % 3]]))
            if step % 100 == 99:
                sizes.append((stretch.mp4.stat().st_size, stretch.actions.stat().st_size))
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert all(after[0] > before[0] and after[1] > before[1] for before, after in pairwise(sizes))
    assert resident[-1] - resident[0] < 8 << 20


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*choose another path"):
        recording(tmp_path / "file")
