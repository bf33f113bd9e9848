"""Promises of specs.py: the laws of time, strict reading, and how two tokenizers are told apart."""

import json
import re
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import CodeSpec, FormatError, MismatchError, TokenizerSpec, fingerprint

COUNT = st.integers(1, 10_000)
STRIDE = st.integers(1, 16)


def code_spec(**changes):
    sizes = {"vocab_size": 512, "grid_height": 8, "grid_width": 9, "code_dim": 16}
    return CodeSpec(**{**sizes, **changes})


@given(num_frames=COUNT, stride=STRIDE)
def test_latent_frames_are_the_fewest_that_cover_the_frames(num_frames, stride):
    spec = code_spec(frames_per_latent=stride)
    t = spec.latent_frames(num_frames)
    assert spec.pixel_frames(t) >= num_frames
    assert t == 1 or spec.pixel_frames(t - 1) < num_frames


@given(latent_frames=COUNT, stride=STRIDE)
def test_pixel_frames_are_exactly_covered(latent_frames, stride):
    spec = code_spec(frames_per_latent=stride)
    assert spec.latent_frames(spec.pixel_frames(latent_frames)) == latent_frames
    assert spec.pixel_frames(1) == 1
    assert spec.pixel_frames(latent_frames + 1) - spec.pixel_frames(latent_frames) == stride


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_the_code_type_is_the_smallest_that_holds_the_vocabulary(vocab_size, dtype):
    assert code_spec(vocab_size=vocab_size).dtype == dtype


def test_residual_levels_are_a_last_axis_and_one_level_is_none():
    assert code_spec().codes_shape(5) == (5, 8, 9)
    assert code_spec(num_levels=3).codes_shape(5) == (5, 8, 9, 3)
    assert code_spec().cells == 72


@pytest.mark.parametrize("field", [field.name for field in fields(CodeSpec)])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "8", 1 << 32])
def test_a_size_that_no_array_has_is_refused_by_field(field, value):
    with pytest.raises(FormatError, match=f"{field} must be an integer"):
        code_spec(**{field: value})
    with pytest.raises(FormatError, match=rf"x\.json: CodeSpec\.{field} must be an integer"):
        CodeSpec.from_dict({**code_spec().to_dict(), field: value}, where="x.json")


def test_specs_survive_json(tokenizer_spec):
    data = json.loads(json.dumps(tokenizer_spec.to_dict()))
    assert TokenizerSpec.from_dict(data, where="test") == tokenizer_spec


@pytest.mark.parametrize("field", [field.name for field in fields(TokenizerSpec)])
def test_a_missing_or_unknown_field_is_refused_by_name(tokenizer_spec, field):
    data = tokenizer_spec.to_dict()
    without = {name: value for name, value in data.items() if name != field}
    with pytest.raises(FormatError, match=rf"x\.json: TokenizerSpec lacks the field '{field}'"):
        TokenizerSpec.from_dict(without, where="x.json")
    with pytest.raises(FormatError, match=f"unknown field '{field}s'"):
        TokenizerSpec.from_dict({**data, f"{field}s": 1}, where="x.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3), ("codes", []), ("codes", None), ("height", 0), ("height", 1 << 17),
        ("width", 2.5), ("resize", "squash"), ("resize", []), ("fps", -1), ("fps", True),
        ("fps", "35"), ("fps", float("nan")), ("fps", float("inf")), ("fps", 10**400),
        ("frame_skip", -1), ("compute_dtype", "int8"), ("fingerprint", "abc"),
        ("fingerprint", "0" * 63 + "G"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_refused_by_name(tokenizer_spec, field, value):
    data = {**tokenizer_spec.to_dict(), field: value}
    with pytest.raises(FormatError, match="CodeSpec" if field == "codes" else field):
        TokenizerSpec.from_dict(data, where="x.json")


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_10000_changed_specs_are_read_or_refused_with_the_files_name(
    tokenizer_spec, mutations, may_refuse, seed
):
    for data in mutations(tokenizer_spec.to_dict(), seed=seed, count=50):
        with may_refuse(FormatError, "x.json: "):
            assert isinstance(TokenizerSpec.from_dict(data, where="x.json"), TokenizerSpec)


OTHERS = {
    "name": "other",
    "height": 17,
    "width": 25,
    "resize": "crop",
    "fps": 30.0,
    "frame_skip": 2,
    "compute_dtype": "bfloat16",
    "fingerprint": "f" * 64,
    "vocab_size": 301,
    "grid_height": 3,
    "grid_width": 4,
    "code_dim": 5,
    "frames_per_latent": 2,
    "num_levels": 2,
}


def changed(spec, field):
    if field in {f.name for f in fields(CodeSpec)}:
        return replace(spec, codes=replace(spec.codes, **{field: OTHERS[field]}))
    return replace(spec, **{field: OTHERS[field]})


def test_the_same_tokenizer_is_accepted(tokenizer_spec):
    tokenizer_spec.require(replace(tokenizer_spec), here="model", there="shards")


@pytest.mark.parametrize("field", sorted(OTHERS))
def test_another_tokenizer_is_refused_with_the_field_and_both_fingerprints(tokenizer_spec, field):
    other = changed(tokenizer_spec, field)
    with pytest.raises(MismatchError) as caught:
        tokenizer_spec.require(other, here="model", there="shards")
    message = str(caught.value)
    assert message.startswith("shards: made with tokenizer ")
    assert field in message
    for spec in (tokenizer_spec, other):
        assert spec.fingerprint[:16] in message
    named = [name for name in OTHERS if re.search(rf"\b{name} \(", message)]
    assert named == [field]


def test_every_field_that_differs_is_named(tokenizer_spec):
    other = changed(changed(tokenizer_spec, "fps"), "grid_width")
    with pytest.raises(MismatchError, match=r"codes\.grid_width \(4 against 3\), fps \(30"):
        tokenizer_spec.require(other, here="model", there="shards")
    covered = {f.name for spec in (CodeSpec, TokenizerSpec) for f in fields(spec)} - {"codes"}
    assert set(OTHERS) == covered


WEIGHTS = st.dictionaries(
    st.text("abc.", min_size=1), st.binary(min_size=1, max_size=8), min_size=1
)


@given(weights=WEIGHTS, rng=st.randoms())
def test_the_order_of_weights_and_settings_does_not_change_the_fingerprint(weights, rng):
    items = list(weights.items())
    rng.shuffle(items)
    digest = fingerprint({"a": 1, "b": [2]}, weights.items())
    assert digest == fingerprint({"b": [2], "a": 1}, items)
    assert len(digest) == 64


@given(weights=WEIGHTS, data=st.data())
def test_every_bit_of_every_weight_changes_the_fingerprint(weights, data):
    name = data.draw(st.sampled_from(sorted(weights)))
    at = data.draw(st.integers(0, len(weights[name]) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    flipped = bytearray(weights[name])
    flipped[at] ^= bit
    digest = fingerprint({}, weights.items())
    assert digest != fingerprint({}, {**weights, name: bytes(flipped)}.items())
    assert digest != fingerprint({}, {**weights, name: weights[name] + b"\0"}.items())
    assert digest != fingerprint({"x": 1}, weights.items())


def test_bytes_that_move_from_one_weight_to_another_change_the_fingerprint():
    assert fingerprint({}, [("a", b"12"), ("b", b"3")]) != fingerprint(
        {}, [("a", b"1"), ("b", b"23")]
    )
    assert fingerprint({}, [("a", b"1")]) != fingerprint({}, [("b", b"1")])


def test_a_recorded_fingerprint_does_not_change_between_versions():
    """To accept another one: every tokenizer that was ever trained loses its shards."""
    digest = fingerprint({"dim": 8, "name": "tiny"}, [("b", b"\1\2"), ("a", b"")])
    assert digest == "d49b3eeef780c9e89a3eb1732b4cb4322765d1a4f8bdcacb2b7d15a81a792f19"
