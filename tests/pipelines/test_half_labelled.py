"""Promises about recordings without known actions beside others: from ingest to evaluation."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from pipelines.conftest import SQUARE_ACTIONS, square_episode
from video_worlds import FPS, SIDE, assert_aligned, played, read_here, write_actions, write_video
from worldloom.common import Episodes, EpisodesSpec, EpisodeWriter, FormatError, TokenShards
from worldloom.dynamics import NULL, SamplingConfig
from worldloom.pipelines import measures
from worldloom.pipelines.evaluate import EvaluateConfig, evaluate
from worldloom.pipelines.generate import GenerateConfig, generate
from worldloom.pipelines.info import InfoConfig, describe, info, words_between
from worldloom.pipelines.ingest import IngestConfig, ingest
from worldloom.pipelines.ingest_config import ActionFileConfig
from worldloom.pipelines.report import _recorded
from worldloom.pipelines.shard_tools import ShardsConfig, shards
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.pipelines.world import World

SILENT = (2, 5, 9, 10)
"""Episodes without known actions of the chain below: 9 is held out, and so is 19."""


# Ingest


def settings(path, kind="videos", **changes):
    plain = {"kind": kind, "output": path.parent / "episodes", "height": SIDE, "width": SIDE}
    if kind == "npz":
        plain["fps"] = float(FPS)
    return IngestConfig(path=path, **{**plain, **changes})


def flags(world, missing="unlabelled"):
    return ActionFileConfig(columns=("action",), names=world.spec.names, missing=missing)


@pytest.fixture
def world():
    return played("discrete", 9)


def recordings(folder, world, kind):
    """a and c with actions, b without."""
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        told = {} if name == "b" else {"actions": world.raw}
        if kind == "npz":
            np.savez(folder / f"{name}.npz", frames=world.frames_THWC, **told)
            continue
        write_video(folder / f"{name}.mp4", world.frames_THWC)
        if told:
            write_actions(folder / f"{name}.csv", world)


@pytest.mark.parametrize("max_frames", [0, 4])
@pytest.mark.parametrize("kind", ["videos", "npz"])
def test_a_recording_without_actions_becomes_an_unlabelled_episode_if_that_is_asked_for(
    tmp_path, world, kind, max_frames
):
    recordings(tmp_path / "v", world, kind)
    config = settings(tmp_path / "v", kind, actions=flags(world), max_frames=max_frames)
    _, answers = read_here(config)
    assert [answer.labelled for answer in answers] == [True, False, True]
    episodes = Episodes(config.output)
    assert episodes.spec.half_labelled
    assert episodes.spec.actions == world.spec
    firsts = dict.fromkeys("abc", 0)
    for key in episodes.keys:
        name, *_ = key.partition("-")
        with episodes.open(key) as episode:
            assert episode.labelled == (name != "b")
            first = firsts[name]
            firsts[name] += episode.num_frames
            assert (episode.slots_TA is None) == (name == "b")
            if name != "b" and kind == "npz":
                assert_aligned(episode, world, first=first)
    assert firsts == {key: len(world.frames_THWC) for key in "abc"}


@pytest.mark.parametrize("kind", ["videos", "npz"])
def test_without_being_asked_it_is_refused_and_the_sentence_names_the_flag(tmp_path, world, kind):
    recordings(tmp_path / "v", world, kind)
    config = settings(tmp_path / "v", kind, actions=flags(world, "refuse"))
    with pytest.raises(FormatError, match=r"b\.\w+: has no .*--actions\.missing unlabelled"):
        ingest(config)
    assert not Episodes(config.output).spec.half_labelled


def test_the_flag_changes_nothing_where_every_recording_has_actions_or_none_has(tmp_path, world):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", world.frames_THWC)
    plain, silent = (
        settings(tmp_path / "v", output=tmp_path / missing, actions=flags(world, missing))
        for missing in ("refuse", "unlabelled")
    )
    for config in (plain, silent):
        read_here(config)
    assert not Episodes(silent.output).spec.half_labelled  # there are no actions to be unknown
    with Episodes(silent.output).open("a") as episode:
        assert episode.labelled
        assert episode.slots_TA.shape == (8, 0)
    write_actions(tmp_path / "v/a.csv", world)
    files = []
    for missing in ("refuse", "unlabelled"):
        config = settings(
            tmp_path / "v", output=tmp_path / f"told-{missing}", actions=flags(world, missing)
        )
        read_here(config)
        files.append((config.output / "a.npz").read_bytes())
    assert files[0] == files[1]


def test_a_damaged_file_of_actions_is_no_missing_one(tmp_path, world):
    recordings(tmp_path / "v", world, "videos")
    (tmp_path / "v/b.csv").write_text("action\n")
    _, answers = read_here(settings(tmp_path / "v", actions=flags(world)))
    assert "b.csv: 0 rows for 9 frames" in answers[1].reason


# The chain behind it


@pytest.fixture(scope="module")
def half(tmp_path_factory, tiny_chain):
    """Twenty short episodes (9 and 19 held out), four without known actions; and their shards."""
    folder = tmp_path_factory.mktemp("half")
    spec = EpisodesSpec(
        actions=SQUARE_ACTIONS, height=16, width=16, fps=8.75, frame_skip=4,
        source={"env": "square"}, half_labelled=True,
    )  # fmt: skip
    (folder / "episodes").mkdir()
    spec.write(folder / "episodes")
    for number in range(20):
        frames, actions = square_episode(12, number)
        with EpisodeWriter(folder / "episodes", f"episode-{number:06d}", spec=spec) as writer:
            for frame in frames:
                writer.append(frame)
            writer.finish(None if number in SILENT else actions)
    tokenize(config(folder, tiny_chain, "shards"))
    return folder


def config(folder, tiny_chain, output, **changes):
    return TokenizeConfig(
        episodes=folder / "episodes", tokenizer=str(tiny_chain.folder / "tokenizer"),
        output=folder / output, device="cpu", workers=1, **{"shard_episodes": 6, **changes},
    )  # fmt: skip


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*")}


def silent(folder):
    return [row.key for row in TokenShards(folder).episodes if not row.labelled]


def test_tokenize_keeps_which_episodes_have_no_known_actions(half, tiny_chain):
    shards = TokenShards(half / "shards")
    shards.verify()
    assert silent(half / "shards") == [f"episode-{number:06d}" for number in SILENT]
    episodes = Episodes(half / "episodes")
    for index, row in enumerate(shards.episodes):
        with episodes.open(row.key) as episode:
            slots_TA = episode.slots_TA
        assert np.array_equal(shards.slots_TA(index), np.zeros((0, 1)) if slots_TA is None
                              else slots_TA)  # fmt: skip
    tokenize(config(half, tiny_chain, "again"))
    assert hashes(half / "again") == hashes(half / "shards")


def test_a_dry_run_knows_the_bytes_of_half_labelled_shards(half, tiny_chain):
    dry = tokenize(config(half, tiny_chain, "dry", dry_run=True))
    tars = (half / "shards").glob("*.tar")
    assert dry.shard_bytes == sum(path.stat().st_size for path in tars)


def test_merging_splitting_and_choosing_keep_it_and_every_byte(half, tmp_path):
    whole = half / "shards"
    shards(ShardsConfig(action="split", folders=(whole,), output=tmp_path / "parts", parts=2))
    parts = tuple(tmp_path / "parts" / name for name in ("part-000", "part-001"))
    assert sorted(key for part in parts for key in silent(part)) == silent(whole)
    shards(ShardsConfig(action="merge", folders=parts, output=tmp_path / "merged"))
    tars = {name: digest for name, digest in hashes(whole).items() if name.endswith(".tar")}
    assert tars.items() <= hashes(tmp_path / "merged").items()
    assert silent(tmp_path / "merged") == silent(whole)
    few = tmp_path / "few"
    keys = tmp_path / "keys.txt"
    keys.write_text("episode-000000\nepisode-000001\n")
    shards(ShardsConfig(action="subset", folders=(whole,), output=few, keys=keys))
    assert silent(few) == []
    assert TokenShards(few).manifest["schema"] == "worldloom.token-shards/1"
    keys.write_text("episode-000002\nepisode-000001\n")
    shards(ShardsConfig(action="subset", folders=(whole,), output=tmp_path / "two", keys=keys))
    assert silent(tmp_path / "two") == ["episode-000002"]
    for folder in (*parts, tmp_path / "merged", few, tmp_path / "two"):
        TokenShards(folder).verify()


def test_info_counts_the_labelled_and_the_preview_says_that_no_action_is_known(half, tmp_path):
    for folder in ("episodes", "shards"):
        about = describe(half / folder, verify=True)
        assert (about["num_episodes"], about["labelled_episodes"]) == (20, 16)
        assert about["actions"]["steps"] == 16 * 11
        assert "labelled episodes" in info(InfoConfig(path=half / folder))
    assert about["num_action_slots"] == 16 * 11
    episodes = Episodes(half / "episodes")
    with episodes.open("episode-000002") as episode:
        assert words_between(episode) == ["no action known"] * 11
    with episodes.open("episode-000003") as episode:
        assert set(words_between(episode)) <= set(SQUARE_ACTIONS.names)
    info(InfoConfig(path=half / "episodes", preview=tmp_path / "p.png"))
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_video_without_actions_has_no_labelled_episodes(tmp_path, world):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", world.frames_THWC)
    read_here(settings(tmp_path / "v"))
    assert describe(tmp_path / "episodes")["labelled_episodes"] == 0


def test_a_report_shows_what_was_recorded_though_some_actions_are_unknown(half, tmp_path):
    shutil.copytree(half / "episodes", tmp_path / "episodes")
    assert "20 episodes of square" in _recorded(tmp_path)


# Judged and played


def evaluation(half, tiny_chain, output):
    return EvaluateConfig(
        **tiny_chain.paths, episodes=half / "episodes", shards=half / "shards", output=output,
        horizon=3, prompt_frames=2, held_frames=2, num_rollouts=4, batch=4, small_pixels=5,
    )  # fmt: skip


def test_a_model_is_judged_by_labelled_episodes_alone_and_it_is_said_how_many_are_not(
    half, tiny_chain, tmp_path, capsys
):
    path = evaluate(evaluation(half, tiny_chain, tmp_path / "out"))
    numbers = json.loads(path.read_text())
    assert "1 of 2 held-out episodes have no known actions" in capsys.readouterr().err
    assert (numbers["settings"]["num_episodes"], numbers["settings"]["num_labelled_episodes"]) == (
        2, 1
    )  # fmt: skip
    assert numbers["tokenizer"]["num_frames"] == 24  # it is judged by all
    # The same folder with the held-out unlabelled one left out gives the same rollouts.
    episodes = Episodes(half / "episodes")
    held_out = measures.read_held_out(episodes, ["episode-000019"], tiny_chain.tokenizer)
    both = measures.read_held_out(episodes, episodes.split("validation"), tiny_chain.tokenizer)
    world = World(tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig())
    known = measures.with_actions(both, world, where="here")
    assert [episode.key for episode in known] == ["episode-000019"]
    alone = measures.given_the_past(world, held_out, 4)
    assert measures.given_the_past(world, known, 4) == alone
    assert numbers["dynamics"]["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-5)


def test_where_no_held_out_episode_is_labelled_it_is_refused_in_a_sentence(
    half, tiny_chain, tmp_path
):
    copy = tmp_path / "half" / "episodes"
    shutil.copytree(half / "episodes", copy)
    (copy / "episode-000019.npz").unlink()
    settings = dataclasses.replace(evaluation(half, tiny_chain, tmp_path / "out"), episodes=copy)
    with pytest.raises(FormatError, match="of its 1 held-out episodes none has known actions"):
        evaluate(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["shards", "episodes"])
def test_a_rollout_starts_from_an_episode_without_known_actions_under_null(
    half, tiny_chain, tmp_path, where
):
    config = GenerateConfig(
        **tiny_chain.paths, start=half / where, episode="episode-000002", actions="LEFT*3",
        prompt_frames=3, output=tmp_path / "out",
    )  # fmt: skip
    session = json.loads((generate(config) / "session.json").read_text())
    assert session["prompt_actions"] == [[NULL], [NULL]]
    with pytest.raises(FormatError, match="no action is known after episode-000002"):
        generate(dataclasses.replace(config, actions="true"))


def test_a_rollout_starts_from_video_without_actions_too(half, tiny_chain, tmp_path):
    spec = dataclasses.replace(
        Episodes(half / "episodes").spec, actions=SQUARE_ACTIONS.none(), half_labelled=False
    )
    spec.write(tmp_path)
    frames, _ = square_episode(8, 1)
    with EpisodeWriter(tmp_path, "a", spec=spec) as writer:
        for frame in frames:
            writer.append(frame)
        writer.finish(np.zeros((7, 0), np.int64))
    config = GenerateConfig(
        **tiny_chain.paths, start=tmp_path, actions="LEFT*2", prompt_frames=2,
        output=tmp_path / "out",
    )  # fmt: skip
    session = json.loads((generate(config) / "session.json").read_text())
    assert session["prompt_actions"] == [[NULL]]
    assert torch.tensor(session["actions"]).shape == (2, 1)
