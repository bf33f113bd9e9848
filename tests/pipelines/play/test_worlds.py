"""Promises of what play finds on a disk: worlds, and varied places in them to begin."""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pipelines.play.playing import WARM
from worldloom.common import ConfigError, FormatError, MismatchError
from worldloom.dynamics import DynamicsModel, SamplingConfig
from worldloom.pipelines.play.session import PlaySession
from worldloom.pipelines.play.start_points import _unlike, picture_start
from worldloom.pipelines.play.worlds import find_worlds, gallery, world_files
from worldloom.pipelines.starts import read_start
from worldloom.pipelines.world import World


@pytest.fixture(scope="module")
def run(tiny_chain, tmp_path_factory):
    """The tiny chain, laid out as demo does it."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    shutil.copytree(tiny_chain.folder / "model", folder / "dynamics" / "model")
    shutil.copytree(tiny_chain.folder / "tokenizer", folder / "tokenizer" / "model")
    for name in ("shards", "episodes"):
        shutil.copytree(tiny_chain.folder / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def world(run):
    files = world_files(run)
    return World.from_pretrained(files.model, files.tokenizer, sampling=SamplingConfig())


def pretend_world(folder, *, age_s):
    """A folder that looks like a world from outside."""
    for part in ("dynamics/model", "tokenizer/model"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
        os.utime(folder / part / "config.json", (10**9 - age_s, 10**9 - age_s))
    return folder


def test_a_demo_s_folder_is_a_world_with_all_its_parts(run):
    files = world_files(run)
    assert files.name == str(run)
    assert files.model == run / "dynamics" / "model"
    assert files.tokenizer == str(run / "tokenizer" / "model")
    assert (files.starts, files.episodes) == (run / "shards", run / "episodes")


def test_without_shards_it_starts_in_the_episodes_and_without_either_nowhere(run, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(run, there)
    shutil.rmtree(there / "shards")
    assert world_files(there).starts == there / "episodes"
    shutil.rmtree(there / "episodes")
    assert (world_files(there).starts, world_files(there).episodes) == (None, None)


def test_worlds_are_found_two_levels_deep_the_newest_first(tmp_path):
    pretend_world(tmp_path / "old", age_s=300)
    pretend_world(tmp_path / "runs" / "demo", age_s=200)
    pretend_world(tmp_path / "runs" / "newest", age_s=100)
    pretend_world(tmp_path / "runs" / "too" / "deep", age_s=0)
    pretend_world(tmp_path / ".hidden", age_s=0)
    (tmp_path / "runs" / "half" / "dynamics" / "model").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    found = find_worlds(tmp_path)
    assert [files.name for files in found] == ["runs/newest", "runs/demo", "old"]
    assert found[0].model == tmp_path / "runs" / "newest" / "dynamics" / "model"


def test_the_folder_itself_may_be_a_world_and_where_there_is_none_none_is_found(tmp_path):
    here = pretend_world(tmp_path / "here", age_s=0)
    assert [files.name for files in find_worlds(here)] == ["here"]
    (tmp_path / "empty").mkdir()
    assert find_worlds(tmp_path / "empty") == []
    assert find_worlds(tmp_path / "nowhere") == []


def test_finding_worlds_needs_no_torch(run):
    code = (
        "import sys; from pathlib import Path; from worldloom.pipelines.play import worlds; "
        f"assert worlds.find_worlds(Path({str(run.parent)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_no_world_is_refused_with_what_it_lacks(tmp_path, run):
    with pytest.raises(FormatError, match="not found"):
        world_files(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="lacks dynamics/model and tokenizer/model"):
        world_files(tmp_path)
    (tmp_path / "dynamics").mkdir()
    shutil.copytree(run / "dynamics" / "model", tmp_path / "dynamics" / "model")
    with pytest.raises(FormatError, match="lacks tokenizer/model"):
        world_files(tmp_path)


@pytest.mark.parametrize("kind", ["shards", "episodes"])
def test_a_gallery_shows_held_out_moments_that_a_session_starts_from(run, world, kind):
    files = replace(world_files(run), starts=run / kind)
    points = gallery(files, world, count=2)
    assert len(points) == 2
    assert {point.moment.episode for point in points} == {"episode-000009"}  # the held-out one
    assert points[0].label == "episode-000009, frame 0"
    session = PlaySession(world, points, sampling=WARM, seed=0, log=None)
    for number, point in enumerate(points):
        shown = session.reset(start=number)
        assert point.start.true_frames_THWC is None
        assert point.frame_HWC.shape == (16, 16, 3)
        if kind == "shards":
            assert np.array_equal(shown.frames_THWC[-1], point.frame_HWC)


def test_shards_and_episodes_give_the_same_prompts(run, world):
    files = world_files(run)
    ours = gallery(files, world, count=2)
    theirs = gallery(replace(files, starts=files.episodes), world, count=2)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.label == other.label
        assert mine.start.codes_thw.tolist() == other.start.codes_thw.tolist()
        assert mine.start.slots_TA.tolist() == other.start.slots_TA.tolist()


def test_a_gallery_takes_what_differs_most():
    frames = [np.full((20, 9, 3), grey, np.uint8) for grey in (0, 10, 120, 5, 250)]
    assert _unlike(frames, 1) == [0]
    assert _unlike(frames, 2) == [0, 4]
    assert _unlike(frames, 3) == [0, 4, 2]
    alike = [np.zeros((16, 16, 3), np.uint8)] * 3
    assert sorted(_unlike(alike, 5)) == [0, 1, 2]


def test_every_place_of_a_gallery_is_there_once(run, world):
    every = gallery(world_files(run), world, count=50)
    assert len({point.label for point in every}) == len(every) > 1


def test_the_truth_of_a_start_is_the_same_prompt_and_what_followed(run, world):
    point = gallery(world_files(run), world, count=2)[1]
    truth = point.read_truth(world)
    assert truth.codes_thw.tolist() == point.start.codes_thw.tolist()
    prompt_frames = len(point.start.codes_thw)
    assert len(truth.true_frames_THWC) > prompt_frames
    assert len(truth.true_slots_TA) == len(truth.true_frames_THWC) - prompt_frames
    whole = read_start(run / "shards", world, point.moment)
    assert np.array_equal(truth.true_frames_THWC, whole.true_frames_THWC)


def test_nobody_knows_what_followed_a_picture(world):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    with pytest.raises(ConfigError, match="nobody knows what followed"):
        picture_start(file.getvalue(), world).read_truth(world)


def test_a_world_without_starts_has_an_empty_gallery_and_a_wrong_one_is_refused(
    run, world, tmp_path, build_tokenizer
):
    files = world_files(run)
    assert gallery(replace(files, starts=None), world, count=3) == []
    with pytest.raises(FormatError, match="has neither manifest"):
        gallery(replace(files, starts=tmp_path), world, count=3)
    other = build_tokenizer(seed=3)
    spec = replace(world.model.spec, tokenizer=other.spec)
    model = DynamicsModel(world.model.config, spec, other.codebook.numpy(), seed=0).eval()
    with pytest.raises(MismatchError):
        gallery(files, World(model, other, sampling=WARM), count=3)
