"""Promises of the environments: Gymnasium's rules, the game's actions, seeds that decide all."""

import io
import json
import os
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch
import worldloom.pipelines  # noqa: F401  registers worldloom/World-v0
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from PIL import Image
from worldloom.common import ActionSpec, ConfigError, FormatError
from worldloom.dynamics import DynamicsConfig, DynamicsModel, DynamicsSpec, SamplingConfig
from worldloom.pipelines.play.start_points import picture_start
from worldloom.pipelines.starts import Moment, read_start, start_from_picture
from worldloom.pipelines.world import World
from worldloom.pipelines.world_env import WorldEnv
from worldloom.pipelines.world_spaces import action_of, action_space, keys_to_action, slots_of
from worldloom.pipelines.world_vector_env import WorldVectorEnv
from worldloom.tokenizer import ConvTokenizer, QuantizerConfig, TokenizerConfig, Trained

WORLD = "worldloom/World-v0"


@pytest.fixture(scope="module")
def run(tiny_chain, tmp_path_factory):
    """The tiny chain, laid out as `worldloom demo` does it."""
    folder = tmp_path_factory.mktemp("world") / "run"
    for part, where in {
        "dynamics/model": "model", "tokenizer/model": "tokenizer", "shards": "shards",
        "episodes": "episodes",
    }.items():  # fmt: skip
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).symlink_to(tiny_chain.folder / where)
    return folder


@pytest.fixture
def make(run):
    """Make an environment of the tiny world; codes are drawn, not the likeliest taken."""
    made = []

    def make(**settings):
        settings = {"world": run, "device": "cpu", "sampling": {"temperature": 1.0}} | settings
        made.append(gymnasium.make(WORLD, **settings))
        return made[-1]

    yield make
    for env in made:
        env.close()


def play_out(env, actions, **reset):
    """Return the frames of a reset and of some actions."""
    first, _ = env.reset(**reset)
    return np.stack([first, *(env.step(action)[0] for action in actions)])


def test_gymnasium_finds_nothing_wrong_with_it(make):
    env = make(render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    assert env.observation_space == spaces.Box(0, 255, (16, 16, 3), np.uint8)
    assert env.action_space == spaces.Discrete(3)
    assert env.metadata["render_fps"] == 9  # 8.75: gymnasium.utils.play takes whole ones


def test_the_same_seed_gives_the_same_frames_and_another_seed_others(make):
    actions = [2, 2, 1, 0, 1, 2]
    first, again = (play_out(make(), actions, seed=5) for _ in range(2))
    other = play_out(make(), actions, seed=6)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, play_out(make(), [0] * 6, seed=5))


def test_its_frames_are_those_of_the_world_from_that_start_under_that_seed(make, run, tiny_chain):
    env = make()
    frame, info = env.reset(seed=3, options={"episode": "episode-000004", "start_frame": 2})
    world = World(tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig(temperature=1.0))
    moment = Moment(episode="episode-000004", start_frame=2, prompt_frames=4)
    start = read_start(run / "shards", world, moment)
    wanted = world.reset(start.codes_thw, start.slots_TA, seed=info["seed"])
    assert info["start"] == "episode-000004, frame 2"
    assert np.array_equal(frame, wanted[-1])
    for action in (1, 2, 0, 2):
        wanted, _ = world.step(np.array([[action]]))
        frame, reward, terminated, truncated, _ = env.step(action)
        assert np.array_equal(frame, wanted[-1])
        assert (reward, terminated, truncated) == (0.0, False, False)


@pytest.mark.parametrize(
    "options",
    [
        {"start_frame": 2},
        {"start": 1, "start_frame": 2},
        {"episode": "episode-000004", "start_frame": -1},
        {"start": 0, "episode": "episode-000004"},
        {"begin": 1},
    ],
)
def test_options_that_name_no_start_are_refused(make, run, options):
    for start in (run / "shards", run / "episodes"):
        env = make(start=start)
        with pytest.raises(ConfigError, match=r"reset options|--start-frame -1 is before"):
            env.reset(options=options)


def test_asking_whether_gymnasium_is_there_does_not_hide_our_worlds():
    code = (
        "import worldloom.pipelines, importlib.util\n"
        "assert importlib.util.find_spec('gymnasium')\n"
        "import gymnasium; gymnasium.spec('worldloom/World-v0')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_starts_can_be_chosen_by_number_episode_or_picture(make, tmp_path):
    env = make()
    starts = [env.reset(seed=1, options={"start": number})[1] for number in (0, 1)]
    assert [info["start"] for info in starts] == [
        "episode-000009, frame 0", "episode-000009, frame 16"
    ]  # fmt: skip
    assert env.unwrapped.num_starts == 2
    # The seed of what follows does not depend on what was chosen.
    assert starts[0]["seed"] == env.reset(seed=1)[1]["seed"]
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 24), (200, 30, 30)).save(path)
    from_file, info = env.reset(seed=1, options={"picture": path})
    assert info["start"] == "red.png"
    for picture in (str(path), path.read_bytes(), np.asarray(Image.open(path))):
        assert np.array_equal(env.reset(seed=1, options={"picture": picture})[0], from_file)


def test_a_damaged_picture_is_refused_in_a_sentence_wherever_it_is_damaged(make, tmp_path):
    env, file, rng = make(), io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    whole, refused = np.frombuffer(file.getvalue(), np.uint8), 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(8, len(whole), 2)] = rng.integers(0, 256, 2)
        try:
            env.reset(seed=0, options={"picture": damaged.tobytes()})
        except FormatError as error:
            assert "not a readable picture" in str(error)  # noqa: PT017 - some can be read
            refused += 1
    assert refused > 100


def test_a_photograph_is_the_same_start_here_as_in_play(make):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by a quarter
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(frame).save(file, "PNG", exif=exif)
    env = make()
    world = env.unwrapped._source.world
    played = picture_start(file.getvalue(), world)
    generated = start_from_picture(file.getvalue(), world, source="a picture")
    assert torch.equal(played.start.codes_thw, generated.codes_thw)
    upright = start_from_picture(frame, world, source="a picture")
    assert not torch.equal(played.start.codes_thw, upright.codes_thw)


def test_without_options_every_start_is_drawn_sooner_or_later(make):
    env = make()
    env.reset(seed=0)
    assert {env.reset()[1]["start"] for _ in range(12)} == {
        "episode-000009, frame 0", "episode-000009, frame 16"
    }  # fmt: skip


def test_it_is_truncated_after_max_steps_and_never_terminated(make):
    env = make(max_steps=3)
    for _ in range(2):
        env.reset(seed=0)
        ends = [env.step(1)[2:4] for _ in range(3)]
        assert ends == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"start": 2}, ConfigError, "start is 2, must be a number from 0 to 1"),
        ({"start": "first"}, ConfigError, "must be a number from 0 to 1"),
        ({"episode": "nobody"}, ConfigError, "no --episode 'nobody'"),
        ({"episode": "0", "start": 1}, ConfigError, "take one of start"),
        ({"strat": 1}, ConfigError, "take one of start"),
        ({"episode": "0", "start_frame": "a"}, ConfigError, "start_frame is 'a', must be"),
        ({"episode": "0", "start_frame": None}, ConfigError, "start_frame is None, must be"),
        ({"picture": None}, ConfigError, "picture is of type NoneType, must be a path"),
        ({"picture": np.zeros((0, 16, 3), np.uint8)}, FormatError, "not empty"),
        ({"picture": b"not a picture"}, FormatError, "a picture: not a readable picture"),
        ({"picture": np.zeros((16, 16), np.uint8)}, FormatError, r"must be uint8 \(height"),
    ],
)
def test_a_start_that_there_is_not_is_refused_in_a_sentence(make, options, error, says):
    env = make()
    with pytest.raises(error, match=says):
        env.reset(seed=0, options=options)


@pytest.mark.parametrize("action", [3, -1, 1.5, [1, 2]])
def test_an_action_outside_the_spec_is_refused_and_nothing_happens(run, action):
    env = WorldEnv(run, device="cpu")
    env.reset(seed=2)
    with pytest.raises(FormatError, match=r"the action space is Discrete\(3\)"):
        env.step(action)
    after = env.step(2)[0]
    env.reset(seed=2)
    assert np.array_equal(env.step(2)[0], after)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"world": "nowhere"}, "nowhere: not found"),
        ({"world": None}, "no world is named"),
        ({"max_steps": 0}, "max-steps must be at least 1"),
        ({"sampling": {"temperature": -1}}, "temperature is -1"),
        ({"sampling": {"heat": 1}}, "heat"),
    ],
)
def test_a_world_that_cannot_be_is_refused_before_anything_is_loaded(run, settings, says):
    with pytest.raises((ConfigError, FormatError), match=says):
        WorldEnv(**{"world": run, **settings})


def test_a_world_without_starts_says_what_it_needs_and_takes_pictures(tiny_chain):
    env = WorldEnv(device="cpu", **tiny_chain.paths)
    with pytest.raises(ConfigError, match="neither token shards nor episodes to start from"):
        env.reset(seed=0)
    env.reset(seed=0, options={"picture": np.full((16, 16, 3), 90, np.uint8)})
    assert env.step(1)[0].shape == (16, 16, 3)


def test_rendering_shows_what_was_seen_last(make):
    env = make(render_mode="rgb_array")
    frame, _ = env.reset(seed=0)
    assert np.array_equal(env.render(), frame)
    frame, *_ = env.step(2)
    assert np.array_equal(env.render(), frame)
    quiet = WorldEnv(env.unwrapped._source.config.world, device="cpu")
    quiet.reset(seed=0)
    assert quiet.render() is None


def test_gymnasiums_vector_environments_give_what_single_ones_give(make, run):
    actions = np.array([[0, 2], [1, 2], [2, 2], [2, 1]])
    settings = {"world": run, "device": "cpu", "sampling": {"temperature": 1.0}}
    envs = gymnasium.make_vec(WORLD, num_envs=2, vectorization_mode="sync", **settings)
    frames = play_out(envs, actions, seed=4)
    for number in range(2):
        alone = play_out(make(), actions[:, number], seed=4 + number)
        assert np.array_equal(frames[:, number], alone)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_processes_side_by_side_give_what_single_ones_give(make, run, context):
    actions = np.array([[0, 2], [1, 2], [2, 2]])
    envs = gymnasium.make_vec(
        "worldloom.pipelines:" + WORLD, num_envs=2, vectorization_mode="async",
        vector_kwargs={"context": context}, world=run, device="cpu",
        sampling={"temperature": 1.0},
    )  # fmt: skip
    try:
        frames = play_out(envs, actions, seed=4)
    finally:
        envs.close()
    for number in range(2):
        alone = play_out(make(), actions[:, number], seed=4 + number)
        assert np.array_equal(frames[:, number], alone)


@pytest.fixture
def make_vec(run):
    """Make as many worlds, in one batch or one after the other."""

    def make_vec(mode, **settings):
        settings = {"world": run, "device": "cpu", "sampling": {"temperature": 1.0}} | settings
        return gymnasium.make_vec(WORLD, vectorization_mode=mode, **settings)

    return make_vec


def test_one_batch_gives_what_as_many_worlds_one_after_the_other_give_over_episodes(make_vec):
    batch, single = (
        make_vec(mode, num_envs=5, max_steps=4) for mode in ("vector_entry_point", "sync")
    )
    assert type(batch).__name__ == "WorldVectorEnv"
    assert batch.action_space == single.action_space
    assert batch.observation_space == single.observation_space
    rng, ends = np.random.default_rng(0), []
    shown = [env.reset(seed=11) for env in (batch, single)]
    for _ in range(12):
        # The decoder's sums round otherwise in another batch: by a grey level, now and then.
        assert np.abs(shown[0][0].astype(int) - shown[1][0]).max() <= 1
        for left, right in zip(shown[0][1:-1], shown[1][1:-1], strict=True):
            assert np.array_equal(left, right)
        assert set(shown[0][-1]) == set(shown[1][-1])
        for key, values in shown[0][-1].items():
            assert np.array_equal(values, shown[1][-1][key]), key
        actions = rng.integers(0, 3, 5)
        shown = [env.step(actions) for env in (batch, single)]
        ends.append(bool(shown[0][3].all()))
    # Four steps, then one that ignores its actions and starts anew.
    assert ends == [False, False, False, True, False] * 2 + [False, False]


def test_a_batch_is_what_make_vec_makes_unless_told_otherwise(make_vec):
    envs = make_vec(None, num_envs=3, render_mode="rgb_array")
    frames, _ = envs.reset(seed=[7, None, 7], options={"start": 0})
    assert envs.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP
    later = envs.step(np.array([1, 1, 1]))[0]
    assert np.array_equal(later[0], later[2])
    assert np.array_equal(np.stack(envs.render()), later)
    assert frames.base is None or not np.shares_memory(frames, later)
    with pytest.raises(ConfigError, match="all of them start anew or none"):
        envs.reset(options={"reset_mask": np.array([True, False, True])})
    with pytest.raises(ConfigError, match="2 for 3 worlds"):
        envs.reset(seed=[1, 2])
    with pytest.raises(FormatError, match="the action space is Discrete"):
        envs.step(np.array([0, 1, 7]))


SPECS = {
    "none": (ActionSpec.none(), spaces.Discrete(1)),
    "discrete": (ActionSpec.discrete(["NOOP", "UP", "FIRE"]), spaces.Discrete(3)),
    "keys": (ActionSpec.keys(["left", "right", "fire"]), spaces.MultiBinary(3)),
    "few keys": (ActionSpec.keys(["left", "right", "fire"], max_keys=2), spaces.MultiBinary(3)),
    "multi_discrete": (
        ActionSpec.multi_discrete([3, 2], names=["move", "fire"]), spaces.MultiDiscrete([3, 2])
    ),
    "continuous": (
        ActionSpec.continuous([-1.0, 0.0], [1.0, 10.0], names=["turn", "gas"], bins=11),
        spaces.Box(np.float32([-1, 0]), np.float32([1, 10]), dtype=np.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_of_action_has_the_games_own_space_and_passes_through_it(kind):
    spec, space = SPECS[kind]
    assert action_space(spec) == space
    space.seed(0)
    for _ in range(50):
        action = space.sample()
        slots_A = slots_of(action, spec)
        if kind != "none":
            spec.check_slots(slots_A[None])
        back = action_of(slots_A, spec)
        assert back in space
        assert np.array_equal(slots_of(back, spec), slots_A)
        if kind in ("discrete", "keys", "multi_discrete"):
            assert np.array_equal(back, action)


def test_of_too_many_keys_the_first_count():
    spec, _ = SPECS["few keys"]
    assert slots_of(np.array([1, 1, 1], np.int8), spec).tolist() == [1, 2]
    assert slots_of(np.array([0, 1, 1], np.int8), spec).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("kind", "action"),
    [("keys", [1, 2, 0]), ("keys", [1, 0]), ("multi_discrete", [3, 0]), ("continuous", [2.0, 1.0]),
     ("continuous", [float("nan"), 1.0])],
)  # fmt: skip
def test_actions_of_every_kind_outside_their_space_are_refused(kind, action):
    with pytest.raises(FormatError, match="the action space is"):
        slots_of(np.asarray(action), SPECS[kind][0])


@pytest.mark.parametrize("kind", SPECS)
def test_keys_press_actions_of_the_space_alone_and_together(kind):
    spec, space = SPECS[kind]
    pressed = keys_to_action(spec)
    assert all(action in space for action in pressed.values())
    assert bool(pressed) == (kind != "none")
    if kind == "keys":
        assert any(np.sum(action) == 2 for action in pressed.values())


def write_world(folder, actions, *, r=1):
    """A world with actions of a kind, and r pixel frames a latent frame; random weights."""
    config = TokenizerConfig(
        height=16, width=16, architecture="video", temporal_stride=r, widths=(8,), num_blocks=(1,),
        quantizer=QuantizerConfig(kind="fsq", fsq_levels=(5, 3)),
    )  # fmt: skip
    tokenizer = ConvTokenizer(config, trained=Trained(fps=10.0, frame_skip=1)).eval()
    tokenizer.save(folder / "tokenizer/model", card="")
    sizes = DynamicsConfig(num_layers=1, dim=16, num_heads=2, context_frames=4, num_meta_tokens=1)
    spec = DynamicsSpec(tokenizer=tokenizer.spec, actions=actions, fps=10.0, frame_skip=1)
    model = DynamicsModel(sizes, spec, tokenizer.codebook.numpy(), seed=0)
    model.save(folder / "dynamics/model", card="")
    return folder


@pytest.mark.parametrize("kind", ["keys", "continuous", "none"])
def test_worlds_with_other_actions_pass_gymnasiums_check_too(tmp_path, kind):
    picture = tmp_path / "start.png"
    Image.new("RGB", (16, 16), (90, 60, 30)).save(picture)
    folder = write_world(tmp_path / "run", SPECS[kind][0])
    env = gymnasium.make(
        WORLD, world=folder, start=picture, device="cpu", render_mode="rgb_array"
    ).unwrapped
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space.*")
        check_env(env)
    assert env.action_space == SPECS[kind][1]


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("worldloom.pipelines, gymnasium", WORLD),
        ("gymnasium, worldloom.pipelines", WORLD),
        ("gymnasium", "worldloom.pipelines:" + WORLD),
    ],
)
def test_gymnasium_knows_it_in_every_order_of_imports_and_making_one_needs_no_torch(
    run, imports, name
):
    code = (
        f"import sys, json, {imports}\n"
        f"env = gymnasium.make({name!r}, world={str(run)!r})\n"
        "hooks = [type(hook).__name__ for hook in sys.meta_path]\n"
        "print(json.dumps(['torch' in sys.modules, str(env.action_space), hooks]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    torch_is_there, space, hooks = json.loads(ended.stdout)
    assert (torch_is_there, space) == (False, "Discrete(3)")
    assert "_WhenGymnasiumComes" not in hooks


@pytest.mark.slow
def test_it_can_be_played_with_gymnasiums_own_player(run):
    pytest.importorskip("pygame", reason="gymnasium.utils.play needs pygame")
    code = (
        "import gymnasium, worldloom.pipelines, pygame\n"
        "from gymnasium.utils.play import play\n"
        f"env = gymnasium.make('{WORLD}', world={str(run)!r}, device='cpu',"
        " render_mode='rgb_array')\n"
        "pressed = []\n"
        "def seen(before, after, action, *rest):\n"
        "    pressed.append(int(action))\n"
        "    kind = pygame.KEYDOWN if len(pressed) == 3 else pygame.KEYUP\n"
        "    if len(pressed) in (3, 6):\n"
        "        pygame.event.post(pygame.event.Event(kind, key=pygame.K_RIGHT))\n"
        "    if len(pressed) == 9:\n"
        "        pygame.event.post(pygame.event.Event(pygame.QUIT))\n"
        "play(env, zoom=4, seed=1, callback=seen, noop=env.unwrapped.noop_action, fps=200)\n"
        "print(pressed)\n"
    )
    environment = os.environ | {"SDL_VIDEODRIVER": "dummy", "MPLBACKEND": "Agg"}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [0, 0, 0, 2, 2, 2, 0, 0, 0]


def test_a_latent_frame_of_several_pixel_frames_is_one_step(tmp_path):
    """The action is held for all of them; the last is seen, all of them are in the info."""
    folder = write_world(tmp_path / "run", ActionSpec.discrete(["a", "b"]), r=4)
    picture = np.full((16, 16, 3), 90, np.uint8)
    settings = {"world": folder, "device": "cpu", "sampling": {"temperature": 1.0}}
    env = WorldEnv(**settings)
    assert env.metadata["render_fps"] == round(10 / 4)
    frame, about = env.reset(seed=0, options={"picture": picture})
    world = World.from_pretrained(
        folder / "dynamics/model", folder / "tokenizer/model",
        sampling=SamplingConfig(temperature=1.0),
    )  # fmt: skip
    start = start_from_picture(picture, world, source="a picture")
    wanted = world.reset(start.codes_thw, start.slots_TA, seed=about["seed"])
    assert np.array_equal(frame, wanted[-1])
    envs = WorldVectorEnv(2, **settings)
    envs.reset(seed=[0, 0], options={"picture": picture})
    for action in (1, 0):
        frames_rHWC, codes_hw = world.step(np.full((4, 1), action))
        frame, *_, info = env.step(action)
        assert np.array_equal(info["frames"], frames_rHWC)
        assert np.array_equal(info["codes"], codes_hw)
        assert np.array_equal(frame, frames_rHWC[-1])
        infos = envs.step(np.array([action, action]))[-1]
        assert np.array_equal(infos["codes"][1], codes_hw)
        assert infos["frames"].shape == (2, 4, 16, 16, 3)
