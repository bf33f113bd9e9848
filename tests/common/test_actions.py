"""Promises of actions.py: exact inverses for every kind, and nothing out of range gets through."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import ActionSpec, FormatError

STEPS = st.integers(0, 6)


@st.composite
def specs_and_slots(draw):
    """Any spec of any kind, and valid slots of a few steps of it."""
    kind = draw(st.sampled_from(["none", "discrete", "keys", "multi_discrete", "continuous"]))
    steps = draw(STEPS)
    n = draw(st.integers(1, 9))
    names = [f"n{i}" for i in range(n)]
    if kind == "none":
        return ActionSpec.none(), np.zeros((steps, 0), np.int64)
    if kind == "discrete":
        rows = draw(st.lists(st.integers(0, n - 1), min_size=steps, max_size=steps))
        return ActionSpec.discrete(names), np.asarray(rows, np.int64).reshape(steps, 1)
    if kind == "keys":
        most = draw(st.integers(1, n))
        spec = ActionSpec.keys(names, max_keys=most)
        pressed = st.sets(st.integers(1, n), max_size=most)
        rows = draw(st.lists(pressed, min_size=steps, max_size=steps))
        slots = [sorted(row) + [0] * (most - len(row)) for row in rows]
        return spec, np.asarray(slots, np.int64).reshape(steps, most)
    if kind == "multi_discrete":
        sizes = draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n))
        spec = ActionSpec.multi_discrete(sizes, names=names)
    else:
        low = draw(st.lists(st.floats(-100, 99), min_size=n, max_size=n))
        width = draw(st.lists(st.floats(0.5, 50), min_size=n, max_size=n))
        bins = draw(st.integers(1, 257))
        bent = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        high = [lo + w for lo, w in zip(low, width, strict=True)]
        spec = ActionSpec.continuous(low, high, names=names, bins=bins, mu_law=bent)
    rows = [[draw(st.integers(0, size - 1)) for size in spec.sizes] for _ in range(steps)]
    return spec, np.asarray(rows, np.int64).reshape(steps, n)


@settings(max_examples=300)
@given(drawn=specs_and_slots())
def test_encode_undoes_decode_for_every_kind(drawn):
    spec, slots = drawn
    raw = spec.decode(slots)
    assert raw.shape[0] == len(slots)
    assert raw.shape == ((len(slots),) if spec.kind == "discrete" else (len(slots), spec.raw_width))
    again = spec.encode(raw)
    assert again.dtype == np.int64
    assert np.array_equal(again, slots)


@settings(max_examples=300)
@given(drawn=specs_and_slots())
def test_decode_undoes_encode_for_every_kind_but_continuous(drawn):
    spec, slots = drawn
    raw = spec.decode(slots)
    again = spec.decode(spec.encode(raw))
    assert again.dtype == raw.dtype
    assert np.array_equal(again, raw)  # for continuous: the centre of a bin is its own centre


@settings(max_examples=300)
@given(drawn=specs_and_slots())
def test_a_spec_survives_json(drawn):
    spec, _ = drawn
    text = json.dumps(spec.to_dict())
    again = ActionSpec.from_dict(json.loads(text), where="test")
    assert again == spec
    assert json.dumps(again.to_dict()) == text


@settings(max_examples=200)
@given(drawn=specs_and_slots())
def test_what_describe_says_of_names_parse_reads(drawn):
    spec, slots = drawn
    if spec.kind in ("discrete", "keys"):
        for text, row in zip(spec.describe(slots), slots, strict=True):
            assert np.array_equal(spec.parse(f"{text}*2"), np.stack([row, row]))


@pytest.mark.parametrize("mu_law", [False, True])
@pytest.mark.parametrize("bins", [1, 2, 11, 255])
def test_a_larger_value_never_has_a_smaller_bin_and_every_bin_is_used(bins, mu_law):
    spec = ActionSpec.continuous([-3.0], [5.0], names=["x"], bins=bins, mu_law=[mu_law])
    values = np.linspace(-3, 5, 200_001)[:, None]
    slots = spec.encode(values)[:, 0]
    assert (np.diff(slots) >= 0).all()
    assert set(slots.tolist()) == set(range(bins))


@pytest.mark.parametrize("mu_law", [False, True])
def test_bins_mirror_around_the_middle_and_an_odd_number_keeps_it_exact(mu_law):
    spec = ActionSpec.continuous([-10.0], [10.0], names=["x"], bins=11, mu_law=[mu_law])
    centres = spec.decode(np.arange(11)[:, None])[:, 0]
    assert np.array_equal(centres, -centres[::-1])
    assert centres[5] == 0
    values = np.random.default_rng(0).uniform(-10, 10, (1000, 1))
    assert np.array_equal(spec.encode(values), 10 - spec.encode(-values))


def test_a_bin_is_at_most_half_its_width_from_the_value():
    spec = ActionSpec.continuous([-1.0], [3.0], names=["x"], bins=8)
    values = np.random.default_rng(0).uniform(-1, 3, (1000, 1))
    assert np.abs(spec.decode(spec.encode(values)) - values).max() <= 0.25 + 1e-6


def test_mu_law_bins_are_finer_near_the_middle():
    spec = ActionSpec.continuous([-1.0], [1.0], names=["x"], bins=11, mu_law=[True])
    steps = np.diff(spec.decode(np.arange(11)[:, None])[:, 0])
    assert (np.diff(steps[5:]) > 0).all()
    # G.711's curve with mu = 255: bin 6 of 11 is centred at (256 ** (2 / 11) - 1) / 255.
    assert spec.decode(np.asarray([[6]]))[0, 0] == pytest.approx((256 ** (2 / 11) - 1) / 255)


def test_an_environment_that_overshoots_its_bounds_by_rounding_is_not_refused():
    spec = ActionSpec.continuous([-0.1], [0.1], names=["x"], bins=3)
    assert spec.encode(np.asarray([[np.float32(0.1)], [np.float32(-0.1)]])).tolist() == [[2], [0]]


def test_bins_finer_than_float32_are_refused_because_decode_could_not_be_undone():
    with pytest.raises(FormatError, match="finer than float32"):
        ActionSpec.continuous([1e6], [1e6 + 1], names=["x"], bins=1000)


def test_pressed_keys_take_the_slots_in_rising_order_whatever_was_pressed_first():
    spec = ActionSpec.keys(["a", "b", "c"], max_keys=2)
    raw = np.asarray([[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1]])
    assert spec.encode(raw).tolist() == [[0, 0], [1, 0], [3, 0], [1, 3], [2, 3]]
    assert np.array_equal(spec.parse("c+a"), spec.parse("a+c"))


def test_noop_is_an_action_of_the_game_and_null_and_padding_are_none(any_actions):
    """-1 (padding, null in windows) and sizes[a] are free in every slot of every kind."""
    if any_actions.kind == "none":
        assert any_actions.num_slots == 0
        return
    good = any_actions.parse(
        {"discrete": "noop", "keys": "none", "multi_discrete": "0,0,0", "continuous": "0,5"}[
            any_actions.kind
        ]
    )
    assert (good >= 0).all()
    for slot in range(any_actions.num_slots):
        for value in (-1, any_actions.sizes[slot]):
            bad = good.copy()
            bad[0, slot] = value
            with pytest.raises(FormatError, match=rf"step 0 has {value} in slot {slot}"):
                any_actions.check_slots(bad)
            with pytest.raises(FormatError):
                any_actions.decode(bad)


@pytest.mark.parametrize("slots", [[0, 3], [3, 1], [2, 2], [0, 1]])
def test_key_slots_that_encode_never_writes_are_refused(slots):
    spec = ActionSpec.keys(["a", "b", "c"], max_keys=2)
    with pytest.raises(FormatError, match="rising keys, then zeros"):
        spec.check_slots(np.asarray([slots]))


@pytest.mark.parametrize(
    ("kind", "raw", "reason"),
    [
        ("discrete", [3], r"step 0 has 3 in slot 0, must be in \[0, 3\)"),
        ("discrete", [0, -1], "step 1 has -1"),
        ("discrete", [2**63], "must be in"),
        ("discrete", [0.0], "integers"),
        ("discrete", [[0]], "shape"),
        ("discrete", 0, "one number"),
        ("keys", [[2, 0, 0, 0]], "must be 0 or 1"),
        ("keys", [[1, 1, 1, 0]], "presses 3 keys, at most 2"),
        ("keys", [[1, 0]], "shape"),
        ("multi_discrete", [[0, 2, 0]], "step 0 has 2 in slot 1"),
        ("multi_discrete", [[0.5, 1, 0]], "integers"),
        ("continuous", [[1.1, 0]], r"1\.1 on axis turn, must be in \[-1\.0, 1\.0\]"),
        ("continuous", [[float("nan"), 0]], "nan on axis turn"),
        ("continuous", [[0, float("inf")]], "inf on axis gas"),
        ("none", [[0]], "shape"),
    ],
)
def test_an_action_out_of_range_is_refused_by_step_and_place(kind, raw, reason, request):
    spec = next(
        spec
        for spec in (
            ActionSpec.none(),
            ActionSpec.discrete(["noop", "left", "right"]),
            ActionSpec.keys(["left", "right", "fire", "jump"], max_keys=2),
            ActionSpec.multi_discrete([3, 2, 300], names=["move", "fire", "weapon"]),
            ActionSpec.continuous([-1.0, 0.0], [1.0, 10.0], names=["turn", "gas"]),
        )
        if spec.kind == kind
    )
    with pytest.raises(FormatError, match=reason):
        spec.encode(np.asarray(raw))


def test_a_written_action_is_held_for_as_many_steps():
    spec = ActionSpec.discrete(["noop", "left", "right"])
    assert spec.parse("right*3").tolist() == [[2], [2], [2]]
    assert spec.parse(" left ").tolist() == [[1]]
    assert spec.parse("2 * 2").tolist() == [[2], [2]]
    keys = ActionSpec.keys(["left", "fire"])
    assert keys.parse("fire+left*2").tolist() == [[1, 2], [1, 2]]
    assert keys.parse("none").tolist() == [[0, 0]]
    multi = ActionSpec.multi_discrete([3, 2], names=["a", "b"])
    assert multi.parse("2, 1").tolist() == [[2, 1]]
    box = ActionSpec.continuous([-1.0], [1.0], names=["turn"], bins=3)
    assert box.parse("-0.9*2").tolist() == [[0], [0]]
    assert ActionSpec.none().parse("none*4").shape == (4, 0)


@pytest.mark.parametrize(
    "text",
    [
        "", "up", "*3", "left*", "left*x", "left*-1", "left*0", "left*1.5", "left*99999999999", "3",
        "-1", "²", "left*²", "1" * 5000, "left*" + "1" * 5000, "left+right",
    ],
)  # fmt: skip
def test_a_word_that_is_no_action_is_refused(text):
    with pytest.raises(FormatError, match="action"):
        ActionSpec.discrete(["noop", "left", "right"]).parse(text)


@pytest.mark.parametrize("text", ["1.7,0", "nan,0", "1", "1,0,0", "x,0", "3,0", "1e400,0"])
def test_numbers_that_are_no_action_are_refused(text):
    with pytest.raises(FormatError, match="action"):
        ActionSpec.multi_discrete([3, 2], names=["a", "b"]).parse(text)


@settings(max_examples=200)
@given(text=st.text(max_size=20) | st.from_regex(r"(left|fire|none)([+*](left|\d+)){0,3}"))
def test_any_text_is_an_action_or_a_format_error(any_actions, text):
    try:
        slots = any_actions.parse(text)
    except FormatError:
        return
    assert len(slots) >= 1
    assert np.array_equal(any_actions.check_slots(slots), slots)


def test_the_slot_type_is_the_smallest_that_holds_every_slot():
    assert ActionSpec.multi_discrete([256], names=["a"]).slot_dtype == "uint8"
    assert ActionSpec.multi_discrete([257], names=["a"]).slot_dtype == "uint16"
    assert ActionSpec.none().slot_dtype == "uint8"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActionSpec.discrete([]),
        lambda: ActionSpec.discrete(["a", "a"]),
        lambda: ActionSpec.keys([]),
        lambda: ActionSpec.keys(["a"], max_keys=2),
        lambda: ActionSpec.keys(["a"], max_keys=0),
        lambda: ActionSpec.multi_discrete([2], names=[]),
        lambda: ActionSpec.multi_discrete([0], names=["a"]),
        lambda: ActionSpec.multi_discrete([1 << 17], names=["a"]),
        lambda: ActionSpec.multi_discrete([2] * 300, names=[str(i) for i in range(300)]),
        lambda: ActionSpec.continuous([0.0], [0.0], names=["a"]),
        lambda: ActionSpec.continuous([0.0], [float("inf")], names=["a"]),
        lambda: ActionSpec.continuous([float("nan")], [1.0], names=["a"]),
        lambda: ActionSpec.continuous([0.0], [1.0, 2.0], names=["a"]),
        lambda: ActionSpec(kind="dance"),
        lambda: ActionSpec(kind="discrete", names=("a",), sizes=(1, 1)),
        lambda: ActionSpec(kind="none", low=(0.0,)),
    ],
)
def test_a_spec_that_describes_no_action_space_is_refused(make):
    with pytest.raises(FormatError, match="ActionSpec"):
        make()


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_10000_changed_specs_are_read_or_refused_with_the_files_name(
    any_actions, mutations, may_refuse, seed
):
    for data in mutations(any_actions.to_dict(), seed=seed, count=10):
        with may_refuse(FormatError, "x.json: "):
            spec = ActionSpec.from_dict(data, where="x.json")
            slots = np.zeros((1, spec.num_slots), np.int64)
            assert np.array_equal(spec.encode(spec.decode(slots)), slots)
