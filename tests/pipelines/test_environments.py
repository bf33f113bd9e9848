from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from worldloom.common import ConfigError, WorldloomError
from worldloom.pipelines import environments
from worldloom.pipelines.environments import Game, GameConfig, open_game

IMAGE = spaces.Box(0, 255, (24, 32, 3), np.uint8)
GREY = spaces.Box(0, 255, (24, 32), np.uint8)
VECTOR = spaces.Box(-1, 1, (4,), np.float32)
TWO = spaces.Discrete(2)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Games litter the folder they run in, and some look for a screen."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.chdir(tmp_path)


def spaces_game(observation: Any = IMAGE, action: Any = TWO, **settings: Any) -> Game:
    kwargs = {"observation": observation, "action": action, **settings.pop("env_kwargs", {})}
    return open_game(GameConfig(env="worlds:Spaces-v0", env_kwargs=kwargs, **settings))


def test_the_frame_is_the_observation_itself_where_it_is_an_image():
    frame = spaces_game(IMAGE).reset(seed=0).frame_HWC
    assert frame.shape == (24, 32, 3)
    assert (frame == 7).all()


@pytest.mark.parametrize("space", [GREY, spaces.Box(0, 255, (24, 32, 1), np.uint8)])
def test_grey_images_become_three_equal_channels(space):
    frame = spaces_game(space).reset(seed=0).frame_HWC
    assert frame.shape == (24, 32, 3)
    assert (frame == 7).all()


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"automap": (40, 40), "screen": (24, 32)}, (24, 32)),
        ({"rgb": (30, 30), "screen": (24, 32)}, (24, 32)),
        ({"obs": (24, 32), "labels": (40, 40), "depth": (40, 40)}, (24, 32)),
        ({"camera": (24, 32), "automap": (40, 40)}, (24, 32)),
    ],
)
def test_the_frame_of_a_dict_is_its_picture_and_never_a_map_or_depth(entries, size):
    parts = {key: spaces.Box(0, 255, (*shape, 3), np.uint8) for key, shape in entries.items()}
    assert spaces_game(spaces.Dict(parts)).native_size == size


def test_a_dict_of_several_unnamed_pictures_is_refused_with_the_list():
    both = spaces.Dict({"left_eye": IMAGE, "right_eye": IMAGE})
    with pytest.raises(ConfigError, match="left_eye, right_eye; choose one with --image-key"):
        spaces_game(both)
    assert spaces_game(both, image_key="right_eye").native_size == (24, 32)


def test_an_image_key_that_is_no_picture_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match="its pictures are screen"):
        spaces_game(spaces.Dict({"screen": IMAGE, "health": VECTOR}), image_key="health")
    with pytest.raises(ConfigError, match="not a Dict"):
        spaces_game(IMAGE, image_key="screen")


def test_a_game_that_shows_no_image_is_rendered():
    frame = spaces_game(VECTOR, env_kwargs={"render_modes": ("rgb_array",)}).reset(seed=0).frame_HWC
    assert (frame == 9).all()


def test_a_game_without_any_picture_is_refused_naming_its_observation_space():
    with pytest.raises(ConfigError, match=r"shows no picture.*Box\(-1.0, 1.0, \(4,\), float32\)"):
        spaces_game(VECTOR)


@pytest.mark.parametrize(
    ("space", "kind", "env_action"),
    [
        (spaces.Discrete(3, start=5), "discrete", 6),
        (spaces.MultiBinary(3), "keys", np.array([1, 0, 1], np.int8)),
        (spaces.MultiDiscrete([2, 5]), "multi_discrete", np.array([1, 4])),
        (spaces.MultiDiscrete([2, 5], start=[3, 1]), "multi_discrete", np.array([4, 5])),
        (spaces.Box(-2, 2, (2,), np.float32), "continuous", np.array([-2, 0.5], np.float32)),
        (
            spaces.Dict({"arrows": spaces.MultiBinary(2), "jump": TWO}),
            "multi_discrete",
            {"arrows": np.array([0, 1], np.int8), "jump": 1},
        ),
        (
            spaces.Tuple((spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 2]))),
            "multi_discrete",
            (3, np.array([0, 1])),
        ),
    ],
)
def test_an_action_reaches_the_game_as_it_was_written_down(space, kind, env_action):
    game = spaces_game(action=space)
    raw = game.raw_action(env_action)
    game.reset(seed=0)
    game.step(raw)
    assert game.actions.kind == kind
    taken = game._env.unwrapped.last
    assert space.contains(taken)
    assert str(taken) == str(env_action)
    game.actions.encode(raw[None])  # what is recorded is an action of the spec


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (2,), np.float32),
        spaces.Box(-1, 1, (2, 2), np.float32),
        spaces.Text(5),
        spaces.Dict({"move": TWO, "aim": VECTOR}),
        spaces.Discrete(100_000),
    ],
)
def test_an_action_space_that_no_spec_describes_is_refused_by_name(space):
    with pytest.raises(ConfigError, match="cannot record the action space") as refused:
        spaces_game(action=space)
    assert str(space) in str(refused.value)


def test_rewards_are_summed_over_the_frames_that_are_skipped():
    game = spaces_game(frame_skip=3)
    game.reset(seed=0)
    assert game.step(game.raw_action(1)).reward == 3.0


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ("CartPol-v1", "did you mean CartPole-v1"),
        ("CartPole", "did you mean CartPole-v"),
        ("worlds:LastActionn-v0", "did you mean LastAction-v0"),
        ("no_such_module:World-v0", "module 'no_such_module' cannot be imported"),
        ("qqqqqqqq", "module that registers it"),
        ("", "no environment"),
    ],
)
def test_an_unknown_id_is_refused_with_the_nearest(env, said):
    with pytest.raises(ConfigError, match=said):
        open_game(GameConfig(env=env))


@pytest.mark.parametrize(
    ("env", "install"),
    [("VizdoomBasic-v1", "vizdoom"), ("ALE/Pong-v5", "ale-py"),
     ("MiniGrid-Empty-8x8-v0", "minigrid"), ("PongNoFrameskip-v4", "ale-py")],
)  # fmt: skip
def test_a_game_whose_package_is_missing_says_what_to_install(env, install, monkeypatch):
    monkeypatch.setattr(environments, "_installed", lambda package: False)
    monkeypatch.setattr(gymnasium, "registry", {})
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {})
    with pytest.raises(ConfigError, match=f"`pip install {install}`"):
        open_game(GameConfig(env=env))


def test_a_setting_the_game_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"CartPole-v1: could not be opened with.*'wind': 3"):
        open_game(GameConfig(env="CartPole-v1", env_kwargs={"wind": 3}))


def test_a_game_that_fails_is_named_with_the_action():
    game = open_game(GameConfig(env="worlds:LastAction-v0", env_kwargs={"fail_at": 0}))
    game.reset(seed=0)
    with pytest.raises(
        WorldloomError, match=r"step with action 2 failed \(RuntimeError: the floor"
    ):
        game.step(np.asarray(2))


def test_frames_are_kept_when_the_game_draws_over_its_buffer():
    game = open_game(GameConfig(env="worlds:LastAction-v0"))
    first = game.reset(seed=0).frame_HWC.copy()
    kept = game.reset(seed=0).frame_HWC
    game.step(np.asarray(3))
    assert np.array_equal(kept, first)


@pytest.mark.parametrize(
    ("env", "names", "fps"),
    [
        ("CartPole-v1", ("LEFT", "RIGHT"), 25.0),
        ("MountainCar-v0", ("LEFT", "NOOP", "RIGHT"), 15.0),
        ("Pendulum-v1", ("TORQUE",), 15.0),
        ("worlds:LastAction-v0", ("ACTION_0", "ACTION_1", "ACTION_2", "ACTION_3"), 10.0),
    ],
)
def test_classic_games_name_their_actions_and_their_speed(env, names, fps):
    game = open_game(GameConfig(env=env, frame_skip=2))
    assert game.actions.names == names
    assert game.fps == fps
    assert open_game(GameConfig(env=env, frame_skip=2, fps=7.5)).fps == 7.5


def test_the_table_of_names_fits_the_games_it_names():
    for name, names in environments._NAMES.items():
        ids = [known for known in gymnasium.registry if known.rpartition("-v")[0] == name]
        assert ids, name
        try:
            space = gymnasium.make(ids[-1], disable_env_checker=True).action_space
        except gymnasium.error.DependencyNotInstalled:
            continue  # Box2D games need a compiler
        wanted = space.n if isinstance(space, spaces.Discrete) else space.shape[0]
        assert len(names) == wanted, name


def test_minigrid_is_rendered_because_its_image_is_a_grid_of_symbols():
    pytest.importorskip("minigrid")
    game = open_game(GameConfig(env="MiniGrid-Empty-8x8-v0"))
    assert game.native_size == (256, 256)
    assert game.actions.names == ("left", "right", "forward", "pickup", "drop", "toggle", "done")
    # A fully observed grid of 8x8 cells is as large as a small picture, and is none either.
    import minigrid  # noqa: F401
    from minigrid.wrappers import FullyObsWrapper, RGBImgObsWrapper

    inner = gymnasium.make("MiniGrid-Empty-8x8-v0")
    config = GameConfig(env="MiniGrid-Empty-8x8-v0")
    assert environments._image_key(FullyObsWrapper(inner), config) is None
    assert environments._image_key(RGBImgObsWrapper(inner), config) == "image"


def test_pong_is_colour_has_its_names_and_never_repeats_actions_by_chance():
    pytest.importorskip("ale_py")
    game = open_game(GameConfig(env="ALE/Pong-v5", frame_skip=4))
    assert game.actions.names == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    assert game.native_size == (210, 160)
    assert game.fps == 15.0
    ale = game._env.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == 0.0
    before = ale.getEpisodeFrameNumber()
    game.reset(seed=0)
    before = ale.getEpisodeFrameNumber()
    game.step(np.asarray(0))
    assert ale.getEpisodeFrameNumber() - before == 4


def test_a_frame_skip_in_the_games_settings_is_refused_in_favour_of_the_flag():
    pytest.importorskip("ale_py")
    with pytest.raises(ConfigError, match="pass --frame-skip 3 instead"):
        open_game(GameConfig(env="ALE/Pong-v5", env_kwargs={"frameskip": 3}))


def test_doom_names_its_buttons_in_the_order_of_its_action_space():
    pytest.importorskip("vizdoom")
    game = open_game(GameConfig(env="VizdoomBasic-v1", frame_skip=4))
    assert game.actions.names == ("NOOP", "ATTACK", "MOVE_RIGHT", "MOVE_LEFT")
    assert game.native_size == (120, 160)
    assert game.fps == 35 / 4

    # A player at the start sees the same wall; after MOVE_LEFT the picture moves to the right.
    first = game.reset(seed=1).frame_HWC
    moved = [game.step(np.asarray(game.actions.names.index("MOVE_LEFT"))) for _ in range(4)]
    wall = slice(45, 62)
    shifts = range(-20, 21)
    errors = [
        np.abs(
            np.roll(first, shift, axis=1)[wall, 30:130].astype(int)
            - moved[-1].frame_HWC[wall, 30:130]
        ).mean()
        for shift in shifts
    ]
    assert shifts[int(np.argmin(errors))] > 0
    game.close()


def test_doom_takes_several_buttons_at_once_as_keys():
    pytest.importorskip("vizdoom")
    game = open_game(GameConfig(env="VizdoomBasic-MultiBinary-v1"))
    assert game.actions.kind == "keys"
    assert game.actions.names == ("MOVE_LEFT", "MOVE_RIGHT", "ATTACK")
    game.close()
    pairs = {"max_buttons_pressed": 2}
    combined = open_game(GameConfig(env="VizdoomBasic-v1", env_kwargs=pairs))
    assert set(combined.actions.names) == {
        "NOOP", "ATTACK", "MOVE_RIGHT", "MOVE_LEFT",
        "MOVE_RIGHT+ATTACK", "MOVE_LEFT+ATTACK", "MOVE_LEFT+MOVE_RIGHT",
    }  # fmt: skip
    combined.close()
