"""Promises of generate: the same seed gives the same codes, and nothing wrong gets in."""

import dataclasses
import functools
import io
import json
import re
import shlex

import av
import numpy as np
import pytest
import torch
from chain_worlds import save_tokenizer
from PIL import Image
from worldloom.common import ConfigError, Episodes, FormatError, MismatchError, npy_bytes
from worldloom.dynamics import DynamicsModel, SamplingConfig, generate_codes
from worldloom.pipelines.cli import main
from worldloom.pipelines.evaluate import EvaluateConfig, evaluate
from worldloom.pipelines.generate import GenerateConfig, generate
from worldloom.tokenizer import load_tokenizer


@pytest.fixture
def run(tiny_chain, tmp_path):
    """Run generate; return (codes, session, folder)."""

    def run(**settings):
        settings = {"start": tiny_chain.folder / "shards", "output": tmp_path / "out"} | settings
        folder = generate(GenerateConfig(**tiny_chain.paths, **settings))
        with np.load(folder / "codes.npz") as arrays:
            codes = arrays["codes"]
        return codes, json.loads((folder / "session.json").read_text()), folder

    return run


def test_the_same_seed_gives_the_same_codes_and_another_seed_others(run, tmp_path):
    first, *_ = run(actions="RIGHT*12", seed=3)
    again, *_ = run(actions="RIGHT*12", seed=3, output=tmp_path / "again")
    other, *_ = run(actions="RIGHT*12", seed=4, output=tmp_path / "other")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_sample_does_not_depend_on_how_many_are_drawn_with_it(run, tmp_path):
    three, session, _ = run(actions="LEFT*6", num_samples=3, seed=10)
    third, *_ = run(actions="LEFT*6", seed=12, output=tmp_path / "third")
    assert session["seeds"] == [10, 11, 12]
    assert np.array_equal(three[2], third[0])


def test_the_prompt_is_kept_and_the_rest_is_what_the_library_generates(run, tiny_chain):
    codes, session, _ = run(actions="RIGHT*5,STAY*2", seed=7)
    held_out = Episodes(tiny_chain.folder / "episodes").split("validation")[0]
    with Episodes(tiny_chain.folder / "episodes").open(held_out) as episode:
        frames, actions = torch.from_numpy(episode.frames()), episode.actions
    prompt_Bthw = tiny_chain.tokenizer.encode(frames[None])[:, :4]
    slots = [*actions[:3], 2, 2, 2, 2, 2, 0, 0]
    wanted = generate_codes(
        tiny_chain.model,
        prompt_Bthw,
        torch.tensor(slots)[None, :, None],
        seeds=[7],
        sampling=SamplingConfig(),
    )
    assert np.array_equal(codes, wanted.numpy())
    assert session["start"] == f"{held_out}, frame 0"
    assert session["action_names"] == ["RIGHT"] * 5 + ["STAY"] * 2


def test_shards_and_episodes_give_the_same_codes(run, tiny_chain, tmp_path):
    moment = {"actions": "true", "episode": "episode-000003", "start_frame": 5, "prompt_frames": 3}
    shards, *_ = run(**moment)
    episodes, *_ = run(
        **moment, start=tiny_chain.folder / "episodes", output=tmp_path / "from-episodes"
    )
    assert np.array_equal(shards, episodes)


def test_true_actions_are_those_of_the_episode_and_end_with_it(run, tiny_chain):
    _, session, _ = run(actions="true", episode="episode-000002", prompt_frames=4, horizon=1000)
    with Episodes(tiny_chain.folder / "episodes").open("episode-000002") as episode:
        assert [slots[0] for slots in session["actions"]] == episode.actions[3:].tolist()


def movie_frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_true_frames_stand_beside_the_generated_ones(run, tiny_chain):
    _, _, folder = run(
        actions="true", horizon=6, episode="episode-000002", scale=4,
        start=tiny_chain.folder / "episodes",
    )  # fmt: skip
    movie = movie_frames(folder / "generated.mp4")
    assert len(movie) == 4 + 6
    with Episodes(tiny_chain.folder / "episodes").open("episode-000002") as episode:
        true = episode.frames(0, 10).repeat(4, 1).repeat(4, 2)
    left = movie[:, 26 : 26 + 64, :64].astype(int)
    assert np.abs(left - true).mean() < 6
    gif = Image.open(folder / "generated.gif")
    assert gif.size == (64 + 6 + 64, 26 + 64 + 26)
    Image.open(folder / "contact-sheet.png").verify()


def test_random_and_sticky_actions_are_drawn_by_the_seed(run, tmp_path):
    for number, policy in enumerate(("random", "sticky")):
        pressed = [
            run(actions=policy, horizon=40, seed=seed, output=tmp_path / f"{number}-{k}")[1]
            for k, seed in enumerate((1, 1, 2))
        ]
        assert pressed[0]["actions"] == pressed[1]["actions"] != pressed[2]["actions"]
        assert len(pressed[0]["actions"]) == 40
    changes = np.count_nonzero(np.diff(np.array(pressed[0]["actions"])[:, 0]))
    assert changes < 15  # sticky: random would change in about 26 of 39


@pytest.mark.parametrize("name", ["pressed.json", "pressed.npy", "pressed.txt", "slots.json"])
def test_actions_come_from_files_of_every_kind(run, tmp_path, name):
    path = tmp_path / name
    slots = np.array([[2]] * 3 + [[1]])
    path.write_bytes(
        {
            "pressed.json": b'["RIGHT*3", "LEFT"]',
            "slots.json": b"[[2], [2], [2], [1]]",
            "pressed.npy": npy_bytes(slots),
            "pressed.txt": b"# first right\nRIGHT*3\n\nLEFT # then left\n",
        }[name]
    )
    assert run(actions=str(path))[1]["actions"] == slots.tolist()


def test_a_picture_is_a_prompt_of_one_frame_resized_by_the_tokenizers_rule(run, tmp_path):
    path = tmp_path / "start.png"
    Image.new("RGB", (40, 24), (200, 30, 30)).save(path)
    codes, session, folder = run(start=path, actions="RIGHT*3")
    assert codes.shape[1] == 1 + 3
    assert session["prompt_frames"] == 1
    assert len(movie_frames(folder / "generated.mp4")) == 4


def test_the_sampling_settings_are_used_and_kept(run, tmp_path):
    greedy = SamplingConfig(temperature=0.0)
    first, session, _ = run(actions="RIGHT*4", sampling=greedy, seed=1)
    second, *_ = run(actions="RIGHT*4", sampling=greedy, seed=2, output=tmp_path / "b")
    assert np.array_equal(first, second)  # the likeliest code needs no seed
    assert session["sampling"] == dataclasses.asdict(greedy)


def test_a_result_is_replaced_but_nothing_else_is(run, tmp_path):
    run(actions="RIGHT*2")
    _, session, _ = run(actions="LEFT*3")
    assert session["action_names"] == ["LEFT"] * 3
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigError, match="not written by generate"):
        run(actions="RIGHT", output=precious)
    assert [path.name for path in precious.iterdir()] == ["diary.txt"]


def test_another_tokenizer_is_refused_naming_both_fingerprints(
    build_tokenizer, tiny_chain, tmp_path
):
    other = build_tokenizer(seed=5)
    other.save(tmp_path / "other", card="other")
    config = GenerateConfig(
        actions="RIGHT", model=tiny_chain.folder / "model", tokenizer=str(tmp_path / "other"),
        start=tiny_chain.folder / "shards", output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(MismatchError, match=other.spec.fingerprint[:16]) as caught:
        generate(config)
    assert tiny_chain.tokenizer.spec.fingerprint[:16] in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_episodes_of_other_actions_are_refused(run, write_episode, episodes_spec, tmp_path):
    folder = tmp_path / "episodes"
    folder.mkdir()
    write_episode(folder, "one", spec=episodes_spec, num_frames=9)
    with pytest.raises(MismatchError, match=r"noop, left, right.*STAY, LEFT, RIGHT"):
        run(actions="RIGHT", start=folder)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"actions": "RUN*3"}, ConfigError, "no such action; there are STAY, LEFT, RIGHT"),
        ({"actions": ""}, ConfigError, "holds no action"),
        ({"actions": "nowhere.json"}, FormatError, "no such file of actions"),
        ({"actions": "RIGHT", "episode": "nobody"}, ConfigError, "no --episode 'nobody'"),
        ({"actions": "RIGHT", "episode": "7"}, ConfigError, "among the held-out ones, 0 to 0"),
        ({"actions": "RIGHT", "start_frame": 27}, ConfigError, "the prompt takes 4 from frame 27"),
        ({"actions": "true", "start_frame": 25}, FormatError, "no action is known"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence_and_nothing_is_written(
    run, tmp_path, settings, error, says
):
    with pytest.raises(error, match=says):
        run(**settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["a picture", "episodes", "evaluate"])
def test_frames_of_another_size_are_refused_by_name_where_the_rule_is_exact(
    tiny_chain, write_episode, tmp_path, what
):
    paths = {"model": tmp_path / "model", "tokenizer": tmp_path / "tokenizer"}
    tokenizer = load_tokenizer(save_tokenizer(paths["tokenizer"], resize="exact"))
    spec = dataclasses.replace(tiny_chain.model.spec, tokenizer=tokenizer.spec)
    codebook_VZ = tokenizer.codebook.numpy()
    DynamicsModel(tiny_chain.model.config, spec, codebook_VZ, seed=0).save(paths["model"], card="")
    large = tmp_path / "large"
    if what == "a picture":
        Image.new("RGB", (40, 32)).save(large, "PNG")
    else:
        large.mkdir()
        episodes = Episodes(tiny_chain.folder / "episodes").spec
        for key in ("a", "b"):
            larger = dataclasses.replace(episodes, height=32, width=40)
            write_episode(large, key, spec=larger, num_frames=9)
    out = tmp_path / "out"
    command = (
        functools.partial(evaluate, EvaluateConfig(**paths, episodes=large, output=out))
        if what == "evaluate"
        else functools.partial(
            generate, GenerateConfig(**paths, actions="RIGHT", start=large, output=out)
        )
    )
    with pytest.raises(MismatchError, match=f"{large}: frames are 32x40.* takes 16x16 exactly"):
        command()
    assert not out.exists()


@pytest.mark.parametrize("actions", ["RIGHT*2", "random"])
def test_the_next_step_can_be_pasted_and_writes_into_another_folder(run, capsys, tmp_path, actions):
    *_, folder = run(actions=actions, horizon=2, prompt_frames=3)
    (line,) = re.findall(r"^next: (worldloom generate .*)$", capsys.readouterr().err, re.MULTILINE)
    words = shlex.split(line)
    following = dict(zip(words[2::2], words[3::2], strict=True))
    assert following["--output"] != str(folder)
    assert following["--prompt-frames"] == "3"
    assert (following["--actions"], following.get("--seed")) == (
        ("random", "1") if actions == "random" else ("sticky", None)
    )
    assert main([*words[1:], "--horizon", "2"]) == 0
    assert (tmp_path / following["--output"] / "generated.gif").exists()


@pytest.mark.parametrize("what", ["model", "tokenizer", "start"])
def test_a_missing_folder_is_named(run, tiny_chain, tmp_path, what):
    settings = {**tiny_chain.paths, "start": tiny_chain.folder / "shards"}
    settings[what] = tmp_path / "missing"
    with pytest.raises(FormatError, match=str(tmp_path / "missing")):
        generate(GenerateConfig(actions="RIGHT", output=tmp_path / "out", **settings))


def test_a_torn_picture_is_refused(run, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(file, "PNG")
    path = tmp_path / "torn.png"
    path.write_bytes(file.getvalue()[:60])
    with pytest.raises(FormatError, match="not a readable picture"):
        run(start=path, actions="RIGHT")


def test_numbers_that_leave_nothing_to_do_are_refused():
    with pytest.raises(ConfigError, match="--num-samples must be at least 1, got 0"):
        GenerateConfig(actions="x", model="m", tokenizer="t", start="s", output="o", num_samples=0)
