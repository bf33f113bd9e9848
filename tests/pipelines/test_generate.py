"""Promises of generate: the same seed gives the same codes, and nothing wrong gets in."""

import dataclasses
import functools
import io
import json
import re
import shlex
from copy import deepcopy

import av
import numpy as np
import pytest
import torch
from chain_worlds import PUSHES, save_tokenizer, write_pushed_squares
from PIL import Image
from worldloom.common import (
    ConfigError,
    Episodes,
    FormatError,
    MismatchError,
    WorldloomError,
    npy_bytes,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsSpec,
    SamplingConfig,
    generate_codes,
    linear,
)
from worldloom.dynamics.onednn import works
from worldloom.pipelines.cli import main
from worldloom.pipelines.evaluate import EvaluateConfig, evaluate
from worldloom.pipelines.generate import GenerateConfig, generate
from worldloom.pipelines.generation import Futures, Job, OwnFutures, roll, same_codes
from worldloom.pipelines.generation_memory import (
    WorldCost,
    free_main_bytes,
    measure_world,
    peak_bytes,
    require_room,
)
from worldloom.pipelines.info import InfoConfig, info
from worldloom.pipelines.info_starts import describe_starts
from worldloom.pipelines.starts import Moment, held_out_moments, read_start, start_from_picture
from worldloom.pipelines.world import World
from worldloom.tokenizer import (
    ConvTokenizer,
    QuantizerConfig,
    TokenizerConfig,
    Trained,
    load_tokenizer,
)


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


# Many starts at once.


@pytest.fixture
def codes_of():
    """The codes that a folder of generate holds."""

    def codes_of(folder):
        with np.load(folder / "codes.npz") as arrays:
            return arrays["codes"]

    return codes_of


@pytest.fixture
def many(tiny_chain, tmp_path):
    """Run generate from several starts; return the folder."""

    def many(**settings):
        settings = {"start": tiny_chain.folder / "shards", "output": tmp_path / "many"} | settings
        return generate(GenerateConfig(**tiny_chain.paths, **settings))

    return many


WARM = SamplingConfig(temperature=1.0, min_p=0.0)


def test_a_start_gets_the_same_codes_alone_and_among_others(run, many, codes_of, tmp_path):
    episodes = ["episode-000002", "0", "episode-000007"]
    settings = {"actions": "RIGHT*6,LEFT*3", "num_samples": 2, "seed": 5, "sampling": WARM}
    together = many(episode=", ".join(episodes), **settings)
    for number, episode in enumerate(episodes):
        alone, session, folder = run(
            **settings, episode=episode, output=tmp_path / f"alone-{number}"
        )
        mine = together / f"start-{number:03d}"
        assert np.array_equal(codes_of(mine), alone)
        assert json.loads((mine / "session.json").read_text()) == session
        assert np.array_equal(
            movie_frames(mine / "generated.mp4"), movie_frames(folder / "generated.mp4")
        )


def test_starts_with_true_actions_of_different_lengths_end_with_their_episodes(
    run, many, codes_of, tmp_path
):
    folder = many(actions="true", episode="episode-000000,episode-000005", horizon=1000)
    for number, frames in enumerate((20, 25)):
        mine = folder / f"start-{number:03d}"
        assert codes_of(mine).shape[1] == frames
        alone, *_ = run(
            actions="true", episode=f"episode-{5 * number:06d}", horizon=1000,
            output=tmp_path / f"{number}",
        )  # fmt: skip
        assert np.array_equal(codes_of(mine), alone)
        movie = Image.open(mine / "generated.gif")
        assert movie.size[0] == 64 + 6 + 64  # true beside generated


def test_held_out_starts_come_from_every_held_out_episode_first_and_never_overlap(tiny_chain):
    world = World(tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig())
    for where in ("shards", "episodes"):
        moments = held_out_moments(
            tiny_chain.folder / where, world, prompt_frames=4, apart_frames=10
        )
        # One of twelve is held out, of 29 frames: a prompt and a frame to come fit at 0, 10, 20.
        assert [(moment.episode, moment.start_frame) for moment in moments] == [
            ("episode-000009", 0), ("episode-000009", 10), ("episode-000009", 20)
        ]  # fmt: skip
    with pytest.raises(FormatError, match="no held-out episode has the 31 frames"):
        held_out_moments(tiny_chain.folder / "shards", world, prompt_frames=30, apart_frames=1)


def test_held_out_starts_begin_every_episode_before_they_go_on_in_one(tiny_chain, tmp_path):
    world = World(tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig())
    # Every tenth is held out; one has just room for a second start, one lacks a frame for it.
    lengths = [6] * 40
    lengths[9], lengths[19], lengths[29], lengths[39] = 15, 14, 4, 30
    folder = write_pushed_squares(tmp_path / "episodes", tuple(lengths))
    moments = held_out_moments(folder, world, prompt_frames=4, apart_frames=10)
    assert [(int(moment.episode[-2:]), moment.start_frame) for moment in moments] == [
        (9, 0), (19, 0), (39, 0), (9, 10), (39, 10), (39, 20)
    ]  # fmt: skip


def test_the_last_action_is_held_until_the_last_latent_frame_is_full(tmp_path):
    tokenizer = ConvTokenizer(
        TokenizerConfig(
            height=16, width=16, architecture="video", temporal_stride=2, widths=(8,),
            num_blocks=(1,), quantizer=QuantizerConfig(kind="fsq", fsq_levels=(5, 3)),
        ),
        trained=Trained(fps=10.0, frame_skip=1),
    ).eval()  # fmt: skip
    spec = DynamicsSpec(tokenizer=tokenizer.spec, actions=PUSHES, fps=10.0, frame_skip=1)
    sizes = DynamicsConfig(num_layers=1, dim=16, num_heads=2, context_frames=4, num_meta_tokens=1)
    model = DynamicsModel(sizes, spec, tokenizer.codebook.numpy(), seed=0).eval()
    with torch.no_grad():  # fresh weights hardly listen
        model.actions.table.weight.mul_(100)
        model.head.to_logits.weight.mul_(20)
    world = World(model, tokenizer, sampling=WARM)
    start = start_from_picture(np.full((16, 16, 3), 90, np.uint8), world, source="grey")

    def futures(*actions):
        job = Job(start, np.array(actions)[:, None])
        return roll(world, [job], seeds=[1], label="rolling").jobs[0]

    held, written = futures(1, 2, 2), futures(1, 2, 2, 2)
    assert np.array_equal(held.codes_Sthw, written.codes_Sthw)
    assert np.array_equal(held.frames[0], written.frames[0][:-1])
    assert not np.array_equal(held.codes_Sthw, futures(1, 2, 2, 1).codes_Sthw)


def test_num_starts_takes_held_out_starts_and_says_where_each_is(many):
    folder = many(actions="RIGHT*2", num_starts=3, horizon=5)
    about = json.loads((folder / "starts.json").read_text())
    assert [row["start"] for row in about["starts"]] == [
        f"episode-000009, frame {frame}" for frame in (0, 9, 18)
    ]
    assert [row["folder"] for row in about["starts"]] == ["start-000", "start-001", "start-002"]
    assert about["frames_per_s"] == pytest.approx(3 * 2 / about["seconds"])
    Image.open(folder / "contact-sheet.png").verify()
    many(actions="LEFT", num_starts=2, horizon=5)  # replaces it
    assert sorted(path.name for path in folder.iterdir()) == [
        "contact-sheet.png", "start-000", "start-001", "starts.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "forged",
    [
        {"seconds": 1e999},
        {"starts": [{"folder": "..", "start": "a", "num_frames": 1}]},
        {"starts": [{"folder": "/", "start": "a", "num_frames": 1}]},
        {"starts": [{"folder": "start-000", "start": "a", "num_frames": 1e999}]},
        {"num_samples": 1e999},
        {"starts": 3},
    ],
)
def test_a_forged_list_of_starts_is_refused_in_a_sentence(many, forged):
    folder = many(actions="LEFT", num_starts=2, horizon=5)
    (folder.parent / "session.json").write_text("{}")  # what a name outside would find
    path = folder / "starts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | forged))
    with pytest.raises(FormatError, match=r"starts\.json"):
        describe_starts(folder)


def test_the_sheet_over_all_starts_has_true_above_generated(many):
    folder = many(actions="true", num_starts=2, horizon=6)
    sheet = np.asarray(Image.open(folder / "contact-sheet.png"))
    # 16 pixels a side, drawn six times as large: two starts, two rows each, labels above the first.
    assert sheet.shape[0] == 12 + 2 * (18 + 96 + 6 + 96 + 6) - 6 + 12


def test_action_files_are_one_for_all_or_one_for_each_start(many, tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.json"
    first.write_text("RIGHT*3\nLEFT")
    second.write_text('["STAY*2"]')
    pressed = []
    for actions in (str(first), f"{first}, {second}"):
        folder = many(actions=actions, episode="0,episode-000001")
        pressed.append(
            [
                json.loads((folder / f"start-00{number}/session.json").read_text())["action_names"]
                for number in (0, 1)
            ]
        )
    right = ["RIGHT"] * 3 + ["LEFT"]
    assert pressed == [[right, right], [right, ["STAY"] * 2]]
    with pytest.raises(ConfigError, match="2 files for 3 starts"):
        many(actions=f"{first},{second}", episode="0,episode-000001,episode-000002")
    with pytest.raises(ConfigError, match="2 files for 1 start;"):
        many(actions=f"{first},{second}")


def test_every_exact_decoder_is_timed_on_the_same_job_and_gives_the_same_codes(
    tiny_chain, capsys, tmp_path
):
    model = tiny_chain.model
    raster = DynamicsModel(
        dataclasses.replace(model.config, order="raster"), model.spec,
        tiny_chain.tokenizer.codebook.numpy(), seed=2,
    )  # fmt: skip
    raster.save(tmp_path / "raster", card="")
    paths = tiny_chain.paths | {"model": tmp_path / "raster"}
    config = GenerateConfig(
        **paths, start=tiny_chain.folder / "shards", output=tmp_path / "out", actions="RIGHT*5",
        episode="0,episode-000001", compare_decoders=True,
    )  # fmt: skip
    rows = json.loads((generate(config) / "decoders.json").read_text())
    assert [row["decoder"] for row in rows] == ["jacobi", "raster", "auto"]
    assert all(row["same_codes"] for row in rows)
    forwards = {row["decoder"]: row["forwards_per_frame"] for row in rows}
    assert forwards["raster"] == model.spec.tokenizer.codes.cells > forwards["jacobi"] >= 1
    said = capsys.readouterr().err
    for row in rows:
        assert re.search(
            rf"{row['decoder']} +[\d.]+ frames/s +[\d.]+ forwards/frame  the same", said
        )


def test_a_decoder_with_other_codes_is_found_out():
    same, other = np.zeros((1, 3, 2, 2), np.int64), np.zeros((1, 3, 2, 2), np.int64)
    other[0, 2, 1, 1] = 1
    these, those = (
        Futures([OwnFutures([], codes)], num_frames=1, seconds=1.0, forwards_per_frame=1.0)
        for codes in (same, other)
    )
    assert same_codes(these, these)
    assert not same_codes(these, those)


def test_what_is_said_of_several_starts_counts_all_their_frames(many, capsys):
    many(actions="RIGHT*5", episode="0,episode-000001", num_samples=3)
    said = capsys.readouterr().err
    assert "generated 30 frames from 2 starts" in said
    assert "6 worlds side by side" in said
    (line,) = re.findall(r"^next: (worldloom generate .*)$", said, re.MULTILINE)
    words = shlex.split(line)
    assert words[words.index("--episode") + 1] == "0,episode-000001"


def test_info_tells_what_was_generated_from_several_starts(many):
    folder = many(actions="RIGHT*5", num_starts=2, num_samples=3, horizon=5)
    about = json.loads(info(InfoConfig(path=folder, json=True, verify=True)))
    assert (about["kind"], about["num_starts"], about["num_samples"]) == ("starts", 2, 3)
    assert about["generated_frames"] == 2 * 3 * 5
    assert "episode-000009, frame 0" in info(InfoConfig(path=folder))
    (folder / "start-001" / "session.json").unlink()
    with pytest.raises(FormatError, match="names 'start-001', which is not there"):
        info(InfoConfig(path=folder))


# What is refused.


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--actions", "RUN*3"], 2, "no such action; there are STAY, LEFT, RIGHT"),
        (["--actions", "7"], 2, "no such action"),
        (["--sampling.temperature", "-0.5"], 2, "temperature is -0.5"),
        (["--sampling.min-p", "1.5"], 2, "min_p is 1.5"),
        (["--sampling.top-p", "0"], 2, "top_p is 0"),
        (["--sampling.top-k", "-1"], 2, "top_k is -1"),
        (["--sampling.decoder", "maskgit"], 2, "decoder is maskgit"),
        (["--num-samples", "10000000"], 2, "10,000,000 worlds .* would take about .* GiB"),
        (["--num-starts", "50"], 2, "has 1 held-out starts that lie 36 frames apart"),
        (["--num-starts", "2", "--episode", "1"], 2, "chooses the starts itself"),
        (["--episode", "0,,1"], 2, "names no episode"),
        (["--episode", "0,0"], 2, "names an episode twice"),
        (["--episode", "0,nobody"], 2, "no --episode 'nobody'"),
    ],
)
def test_every_bad_input_is_one_line_and_an_exit_code(
    tiny_chain, tmp_path, capsys, flags, code, says
):
    words = {
        "--model": tiny_chain.folder / "model", "--tokenizer": tiny_chain.folder / "tokenizer",
        "--start": tiny_chain.folder / "shards", "--output": tmp_path / "out",
        "--actions": "RIGHT", "--device": "cpu",
    } | dict(zip(flags[::2], flags[1::2], strict=True))  # fmt: skip
    assert main(["generate", *(str(word) for pair in words.items() for word in pair)]) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(says, said[0])
    assert not (tmp_path / "out").exists()


def test_a_prompt_on_another_grid_is_refused(tiny_chain):
    codes_Bthw = torch.zeros(1, 3, 5, 5, dtype=torch.int64)
    with pytest.raises(WorldloomError, match=r"prompt: .*h"):
        generate_codes(
            tiny_chain.model, codes_Bthw, torch.zeros(1, 4, 1, dtype=torch.int64), seeds=[0],
            sampling=SamplingConfig(),
        )  # fmt: skip


def test_num_starts_of_a_picture_is_refused(run, tmp_path):
    path = tmp_path / "start.png"
    Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(ConfigError, match="is one picture, so there is one start"):
        run(start=path, actions="RIGHT", num_starts=2)


def test_more_worlds_than_memory_are_refused_with_the_number_that_fits(monkeypatch):
    cost = WorldCost(rolling_bytes=80 * 2**20, frames_bytes=20 * 2**20, movie_bytes=2**20)
    free = 2 * 2**30
    monkeypatch.setattr("worldloom.pipelines.generation_memory.free_main_bytes", lambda: free)
    cpu = torch.device("cpu")
    require_room(cost, starts=18, samples=1, device=cpu)
    with pytest.raises(ConfigError, match=r"19 worlds .* 1\.9 GiB of main .* 2\.0 GiB are free; at "
                       r"most 18 starts would fit"):  # fmt: skip
        require_room(cost, starts=19, samples=1, device=cpu)
    with pytest.raises(ConfigError, match="at most 18 samples of each would fit"):
        require_room(cost, starts=1, samples=30, device=cpu)
    with pytest.raises(ConfigError, match="at most 6 starts or 1 samples of each would fit"):
        require_room(cost, starts=10, samples=3, device=cpu)
    with pytest.raises(ConfigError, match="about 18 would fit: take fewer starts and fewer"):
        require_room(cost, starts=20, samples=20, device=cpu)
    require_room(cost, starts=15, samples=1, device=cpu, copies=2)
    with pytest.raises(ConfigError, match="at most 15 starts would fit"):
        require_room(cost, starts=16, samples=1, device=cpu, copies=2)
    with pytest.raises(ConfigError, match="not even one of each fits"):
        require_room(
            WorldCost(rolling_bytes=2**40, frames_bytes=1, movie_bytes=1), starts=1, samples=1,
            device=cpu,
        )  # fmt: skip


def test_the_memory_of_a_computation_is_its_live_tensors_at_their_most():
    def work():
        kept = [torch.ones(1000) for _ in range(5)]
        for _ in range(10):
            kept[0] = kept[0] * 2  # two of them live while it is computed
        kept[0].view(10, 100).add_(1)  # nothing new
        return kept

    assert peak_bytes(work, torch.device("cpu")) == 6 * 4000


@pytest.mark.parametrize("laid_out", [True, False])
def test_a_world_is_measured_as_what_it_keeps_at_least_and_more_when_guided(
    tiny_chain, monkeypatch, laid_out
):
    if laid_out and not works(torch.float32):
        pytest.skip("torch cannot lay out weights for this processor")
    # Weights that are laid out while a world is measured are tensors without memory to ask for.
    least = 1 if laid_out else 1 << 40
    monkeypatch.setattr(linear, "_PACKED_FROM", least)
    costs = []
    for scale in (1.0, 2.0):
        sampling = SamplingConfig(guidance_scale=scale)
        world = World(deepcopy(tiny_chain.model), tiny_chain.tokenizer, sampling=sampling)
        start = read_start(
            tiny_chain.folder / "shards", world,
            Moment(episode="0", start_frame=0, prompt_frames=4),
        )  # fmt: skip
        job = Job(start, np.array([[2], [2]]))
        costs.append(measure_world(world, job, steps=6, scale=4))
        assert laid_out == any(getattr(part, "_packed", None) for part in world.model.modules())
    assert costs[0].frames_bytes == 10 * 16 * 16 * 3
    cache = tiny_chain.model.start_cache(batch=1).size_bytes
    assert costs[0].rolling_bytes > cache
    assert costs[1].rolling_bytes > costs[0].rolling_bytes + cache


def test_a_containers_limit_counts_where_it_is_below_what_the_machine_has(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    assert free_main_bytes(tmp_path) == 500 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert free_main_bytes(tmp_path) == 500 * 1024
    (group / "memory.max").write_text("301000\n")
    assert free_main_bytes(tmp_path) == 300_000
    # What was read from files is given up as soon as somebody wants the room.
    (group / "memory.current").write_text("301000\n")
    (group / "memory.stat").write_text("anon 1000\ninactive_file 150000\nactive_file 50000\n")
    assert free_main_bytes(tmp_path) == 200_000
