import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from worldloom.common import ActionSpec, FormatError
from worldloom.dynamics import NULL
from worldloom.pipelines.play.controls import RESERVED_KEYS, Controls
from worldloom.pipelines.sources.vpt_lines import KEYS as VPT_KEYS

ALE = [
    "NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT",
    "UPFIRE", "RIGHTFIRE", "LEFTFIRE", "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE",
    "DOWNLEFTFIRE",
]  # fmt: skip
GAMES = {
    "vizdoom_basic": ActionSpec.discrete(["NOOP", "ATTACK", "MOVE_RIGHT", "MOVE_LEFT"]),
    "vizdoom_corridor": ActionSpec.keys(
        ["MOVE_FORWARD", "MOVE_LEFT", "MOVE_RIGHT", "TURN_LEFT", "TURN_RIGHT", "ATTACK", "USE"]
    ),
    "ale": ActionSpec.discrete(ALE),
    "minigrid": ActionSpec.discrete(
        ["left", "right", "forward", "pickup", "drop", "toggle", "done"]
    ),
    "minecraft": ActionSpec.multi_discrete(
        [2] * len(VPT_KEYS) + [11, 11], names=[*VPT_KEYS, "camera_pitch", "camera_yaw"]
    ),
    "keyboard": ActionSpec.keys(["key.keyboard.w", "key.keyboard.a", "key.keyboard.space"]),
    "procgen": ActionSpec.discrete(
        [
            "LEFTDOWN",
            "LEFT",
            "LEFTUP",
            "DOWN",
            "NOOP",
            "UP",
            "RIGHTDOWN",
            "RIGHT",
            "RIGHTUP",
            *"DAWSQE",
        ]
    ),
    "car_racing": ActionSpec.continuous([-1, 0, 0], [1, 1, 1], names=["STEER", "GAS", "BRAKE"]),
    "lander": ActionSpec.discrete(["NOOP", "LEFT_ENGINE", "MAIN_ENGINE", "RIGHT_ENGINE"]),
    "cart_pole": ActionSpec.discrete(["0", "1"]),
    "unnamed": ActionSpec.discrete([f"ACTION_{number}" for number in range(13)]),
    "none": ActionSpec.none(),
}

# What a hand expects: control -> its first key.
EXPECTED = {
    "vizdoom_basic": {"ATTACK": "Space", "MOVE_LEFT": "KeyA", "MOVE_RIGHT": "KeyD"},
    "vizdoom_corridor": {
        "MOVE_FORWARD": "KeyW", "MOVE_LEFT": "KeyA", "MOVE_RIGHT": "KeyD",
        "TURN_LEFT": "ArrowLeft", "TURN_RIGHT": "ArrowRight", "ATTACK": "Space", "USE": "KeyE",
    },
    "ale": {
        "FIRE": "Space", "UP": "ArrowUp", "RIGHT": "ArrowRight", "LEFT": "ArrowLeft",
        "DOWN": "ArrowDown",
    },
    "minigrid": {"left": "ArrowLeft", "right": "ArrowRight", "forward": "ArrowUp",
                 "toggle": "KeyE"},
    "minecraft": {
        "forward": "KeyW", "left": "KeyA", "back": "KeyS", "right": "KeyD", "jump": "Space",
        "camera_yaw-": "ArrowLeft", "camera_yaw+": "ArrowRight", "camera_pitch-": "ArrowUp",
        "camera_pitch+": "ArrowDown", "hotbar.3": "Digit3",
    },
    "keyboard": {"key.keyboard.w": "KeyW", "key.keyboard.a": "KeyA", "key.keyboard.space": "Space"},
    "procgen": {"LEFT": "ArrowLeft", "UP": "ArrowUp", "A": "KeyA", "W": "KeyW", "E": "KeyE"},
    "car_racing": {
        "STEER-": "ArrowLeft", "STEER+": "ArrowRight", "GAS+": "ArrowUp", "BRAKE+": "ArrowDown",
    },
    "lander": {"LEFT_ENGINE": "ArrowLeft", "MAIN_ENGINE": "ArrowUp", "RIGHT_ENGINE": "ArrowRight"},
    "cart_pole": {"0": "Digit0", "1": "Digit1"},
    "unnamed": {"ACTION_0": "Digit0", "ACTION_9": "Digit9", "ACTION_10": "KeyA",
                "ACTION_11": "KeyS"},
    "none": {},
}  # fmt: skip


@pytest.mark.parametrize("game", GAMES)
def test_the_actions_of_known_games_lie_where_a_hand_expects_them(game):
    first = {c.name: c.keys[0] for c in Controls.of(GAMES[game]).controls}
    assert first.items() >= EXPECTED[game].items()


def test_a_game_that_only_walks_can_be_walked_with_the_arrows_too():
    keys = {c.name: c.keys for c in Controls.of(GAMES["vizdoom_basic"]).controls}
    assert keys["MOVE_LEFT"] == ("KeyA", "ArrowLeft")
    assert keys["MOVE_RIGHT"] == ("KeyD", "ArrowRight")


def test_an_atari_game_has_five_controls_and_every_combination_of_them_that_it_knows():
    controls = Controls.of(GAMES["ale"])
    assert [c.name for c in controls.controls] == ["FIRE", "UP", "RIGHT", "LEFT", "DOWN"]
    for value, name in enumerate(ALE):
        held = [part for part in ("UP", "DOWN", "LEFT", "RIGHT", "FIRE") if part in name]
        assert controls.slots_A(held).tolist() == [value], name
        assert controls.slots_A(held[::-1]).tolist() == [value], name


def test_of_two_that_exclude_each_other_the_newest_counts():
    ale = Controls.of(GAMES["ale"])
    assert ale.slots_A(["LEFT", "RIGHT"]).tolist() == [ALE.index("RIGHT")]
    assert ale.slots_A(["RIGHT", "LEFT"]).tolist() == [ALE.index("LEFT")]
    assert ale.slots_A(["RIGHT", "FIRE", "LEFT"]).tolist() == [ALE.index("LEFTFIRE")]
    doom = Controls.of(GAMES["vizdoom_basic"])
    assert doom.slots_A(["MOVE_LEFT", "ATTACK"]).tolist() == [1]
    car = Controls.of(GAMES["car_racing"])
    assert car.slots_A(["STEER-", "STEER+", "GAS+"]).tolist() == [10, 10, 0]


def test_combinations_written_with_a_plus_are_pressed_by_their_parts():
    controls = Controls.of(ActionSpec.discrete(["NOOP", "A", "B", "A+B", "B+C"]))
    assert [c.name for c in controls.controls] == ["A", "B", "C"]
    assert controls.slots_A(["B", "A"]).tolist() == [3]
    assert controls.slots_A(["C"]).tolist() == [0]
    assert controls.slots_A(["C", "B"]).tolist() == [4]


@pytest.mark.parametrize("name", ["NOOP", "noop", "none", "idle", "STAY", "no_op", "do nothing"])
def test_holding_nothing_is_the_no_op_where_there_is_one(name):
    controls = Controls.of(ActionSpec.discrete(["left", name, "right"]))
    assert controls.slots_A([]).tolist() == [1]
    assert [c.name for c in controls.controls] == ["left", "right"]


def test_holding_nothing_is_no_action_where_the_game_has_no_no_op():
    assert Controls.of(GAMES["cart_pole"]).slots_A([]).tolist() == [NULL]


def test_of_more_keys_than_the_game_takes_the_newest_count():
    controls = Controls.of(ActionSpec.keys(["a", "b", "c", "d"], max_keys=2))
    assert controls.slots_A(["d", "a", "c"]).tolist() == [1, 3]
    assert controls.slots_A(["a", "c", "d", "a"]).tolist() == [1, 4]


def test_an_axis_that_nobody_touches_stands_where_nothing_happens():
    assert Controls.of(GAMES["car_racing"]).slots_A([]).tolist() == [5, 0, 0]
    off_zero = ActionSpec.continuous([2.0], [4.0], names=["height"])
    assert Controls.of(off_zero).slots_A([]).tolist() == [5]
    assert Controls.of(GAMES["minecraft"]).slots_A([]).tolist() == [0] * len(VPT_KEYS) + [5, 5]


def test_a_camera_turns_at_a_pace_that_a_hand_can_steer():
    spec = ActionSpec.continuous([-10.0], [10.0], names=["yaw"], mu_law=[True])
    controls = Controls.of(spec)
    right = spec.decode(controls.slots_A(["yaw+"])[None])[0, 0]
    left = spec.decode(controls.slots_A(["yaw-"])[None])[0, 0]
    assert 1.5 < right < 4.5
    assert left == -right


def test_with_more_actions_than_keys_every_action_is_still_a_control():
    controls = Controls.of(ActionSpec.discrete([f"verb_{chr(97 + i)}x" for i in range(26)] + [
        f"noun_{chr(97 + i)}x" for i in range(26)
    ])).controls  # fmt: skip
    assert len(controls) == 52
    with_keys = [bool(c.keys) for c in controls]
    assert 40 <= sum(with_keys) < 52
    assert with_keys == sorted(with_keys, reverse=True)  # the first ones got them


def test_a_choice_of_hundreds_offers_a_few_evenly_spread_and_both_ends():
    spec = ActionSpec.multi_discrete([300], names=["weapon"])
    controls = Controls.of(spec)
    values = [int(controls.slots_A([c.name])[0]) for c in controls.controls]
    assert values[0] == 1
    assert values[-1] == 299
    assert 8 <= len(values) <= 20
    assert max(np.diff(values)) <= 2 * min(np.diff(values))


def test_an_axis_called_as_another_ones_value_is_a_control_of_its_own():
    controls = Controls.of(ActionSpec.multi_discrete([3, 2], names=["move", "move=1"]))
    assert len({control.name for control in controls.controls}) == 3
    pressed = {tuple(controls.slots_A([control.name])) for control in controls.controls}
    assert pressed == {(1, 0), (2, 0), (0, 1)}


def test_a_name_that_is_no_control_is_refused_with_those_there_are():
    with pytest.raises(FormatError, match="'JUMP' is no control of this world; there are ATTACK"):
        Controls.of(GAMES["vizdoom_basic"]).slots_A(["ATTACK", "JUMP"])


def test_labels_read_as_people_write():
    labels = {c.name: c.label for game in GAMES.values() for c in Controls.of(game).controls}
    assert labels["MOVE_LEFT"] == "Move left"
    assert labels["swapHands"] == "Swap hands"
    assert labels["key.keyboard.w"] == "W"
    assert labels["STEER-"] == "Steer -"


NAMES = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*ALE, *VPT_KEYS, "MOVE_LEFT", "TURN_LEFT", "LOOK_UP", "idle", "left+right"]),
    st.lists(st.sampled_from(["a", "b", "UP", "LEFT", ""]), min_size=1, max_size=3).map("+".join),
    st.text("ab=+-1'", max_size=4),
)


def _names(count):
    return st.lists(NAMES, min_size=count, max_size=count, unique=True)


@st.composite
def specs(draw):
    kind = draw(st.sampled_from(["discrete", "keys", "multi_discrete", "continuous"]))
    names = draw(_names(draw(st.integers(1, 60 if kind in ("discrete", "keys") else 8))))
    if kind == "discrete":
        return ActionSpec.discrete(names)
    if kind == "keys":
        return ActionSpec.keys(names, max_keys=draw(st.integers(1, len(names))))
    if kind == "multi_discrete":
        sizes = draw(st.lists(st.integers(1, 40), min_size=len(names), max_size=len(names)))
        return ActionSpec.multi_discrete(sizes, names=names)
    lows = draw(st.lists(st.integers(-3, 2), min_size=len(names), max_size=len(names)))
    return ActionSpec.continuous(
        lows,
        [low + draw(st.integers(1, 4)) for low in lows],
        names=names,
        bins=draw(st.integers(1, 15)),
        mu_law=[draw(st.booleans()) for _ in names],
    )  # fmt: skip


@st.composite
def held_controls(draw):
    controls = Controls.of(draw(specs()))
    names = [control.name for control in controls.controls]
    return controls, draw(st.lists(st.sampled_from(names), max_size=6)) if names else []


@given(held_controls())
@example((Controls.of(GAMES["none"]), []))
def test_whatever_is_held_the_world_takes_it(case):
    controls, held = case
    slots_A = controls.slots_A(held)
    assert slots_A.dtype == np.int64
    if (slots_A == NULL).any():
        assert controls.spec.kind == "discrete"
    else:
        controls.spec.check_slots(slots_A[None])
    if controls.spec.kind == "keys":
        assert np.count_nonzero(slots_A) == min(len(set(held)), controls.spec.num_slots)


@given(held_controls())
def test_what_is_shown_as_held_gives_the_same_slots_when_it_is_held(case):
    controls, held = case
    slots_A = controls.slots_A(held)
    assert controls.slots_A(controls.held_of(slots_A)).tolist() == slots_A.tolist()


@given(specs())
def test_no_key_is_in_two_controls_and_none_is_one_that_play_itself_needs(spec):
    controls = Controls.of(spec).controls
    keys = [key for control in controls for key in control.keys]
    assert len(set(keys)) == len(keys)
    assert not RESERVED_KEYS & set(keys)
    assert not {"Tab", "Escape", "Enter", "KeyP", "KeyR", "Period", "Comma"} & set(keys)
    assert len({control.name for control in controls}) == len(controls)
    assert all(control.label for control in controls)
    if len(controls) <= 20:
        assert all(control.keys for control in controls)


@given(st.data())
def test_every_discrete_action_and_every_set_of_keys_can_be_held(data):
    spec = data.draw(specs().filter(lambda spec: spec.kind in ("discrete", "keys")))
    controls = Controls.of(spec)
    if spec.kind == "discrete":
        steps = np.arange(len(spec.names))[:, None]
    else:
        count = min(2, spec.num_slots)
        raw = np.zeros((0, len(spec.names)), np.int64)
        for pressed in list(combinations(range(len(spec.names)), count))[:50]:
            raw = np.vstack([raw, np.isin(np.arange(len(spec.names)), pressed)])
        steps = spec.encode(raw)
    for slots_A in steps:
        assert controls.slots_A(controls.held_of(slots_A)).tolist() == slots_A.tolist()


def test_somebody_elses_finer_turn_shows_as_the_direction_it_goes():
    controls = Controls.of(ActionSpec.continuous([-1], [1], names=["turn"]))
    assert controls.held_of(np.array([9])) == ("turn+",)
    assert controls.held_of(np.array([1])) == ("turn-",)
    assert controls.held_of(np.array([5])) == ()
    assert controls.held_of(np.array([NULL])) == ()


def test_controls_do_not_import_torch():
    code = (
        "import sys, worldloom.pipelines.play.controls as c; "
        "sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
