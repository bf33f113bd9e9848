"""Promises of config.py: strict tables, the order of precedence, and the nearest name in errors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import (
    ConfigError,
    FormatError,
    build,
    describe_difference,
    nearest,
    partial,
    read_toml,
    to_plain,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    dim: int
    rate: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    output: Path
    clip_frames: int = 16
    name: str = "x"
    flag: bool = False
    mode: Literal["fast", "exact"] = "exact"
    levels: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    limit: int | None = None
    either: int | str = 0
    inner: Inner = field(default_factory=lambda: Inner(dim=8))
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clip_frames < 1:
            raise ValueError("clip_frames must be at least 1")


WHOLE = {
    "output": "runs/x",
    "clip_frames": 8,
    "name": "y",
    "flag": True,
    "mode": "fast",
    "levels": [8, 5],
    "pair": [2, "b"],
    "limit": 3,
    "either": "many",
    "inner": {"dim": 4, "rate": 1},
    "extra": {"anything": [1]},
}


def test_a_table_becomes_the_dataclass_with_the_types_of_its_fields():
    built = build(Outer, WHOLE, where="t")
    assert built == Outer(
        output=Path("runs/x"), clip_frames=8, name="y", flag=True, mode="fast", levels=(8, 5),
        pair=(2, "b"), limit=3, either="many", inner=Inner(dim=4, rate=1.0),
        extra={"anything": [1]},
    )  # fmt: skip
    assert type(built.inner.rate) is float


def test_what_is_not_set_has_the_default_of_the_dataclass():
    assert build(Outer, {"output": "a"}, where="t") == Outer(output=Path("a"))


def test_a_config_survives_toml(tmp_path):
    for config in (build(Outer, WHOLE, where="t"), Outer(output=Path("a"))):
        (tmp_path / "c.toml").write_text(tomli_w.dumps(to_plain(config)))
        assert build(Outer, read_toml(tmp_path / "c.toml"), where="t") == config


def test_default_yields_to_preset_yields_to_file_yields_to_flag():
    preset = partial(Outer, {"clip_frames": 1, "name": "preset", "levels": [1]}, where="preset")
    file = partial(Outer, {"clip_frames": 2, "name": "file"}, where="file")
    flags = {"clip_frames": 3, "output": Path("flag")}
    built = build(Outer, {**preset, **file, **flags}, where="flags")
    assert (built.clip_frames, built.name, built.levels) == (3, "file", (1,))
    assert (built.output, built.mode) == (Path("flag"), "exact")


@pytest.mark.parametrize("read", [build, partial])
def test_an_unknown_key_is_refused_with_the_nearest_name(read):
    with pytest.raises(ConfigError) as caught:
        read(Outer, {"output": "a", "clip_frame": 3}, where="demo.toml")
    assert str(caught.value) == "demo.toml: unknown key 'clip_frame'; did you mean 'clip_frames'?"


def test_an_unknown_key_in_an_inner_table_names_the_table():
    with pytest.raises(ConfigError, match=r"t: inner: unknown key 'dims'; did you mean 'dim'"):
        build(Outer, {"output": "a", "inner": {"dims": 3}}, where="t")


def test_a_word_like_no_other_is_told_all_there_are():
    assert nearest("zzz", ["fast", "exact"]) == "; there are fast, exact"
    assert nearest("fas", ["fast", "exact"]) == "; did you mean 'fast'?"


def test_a_missing_key_is_refused_by_name_but_a_part_may_lack_it():
    with pytest.raises(ConfigError, match="t: key 'output' is missing"):
        build(Outer, {}, where="t")
    assert partial(Outer, {}, where="t") == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output", 3), ("clip_frames", "8"), ("clip_frames", 8.0), ("clip_frames", True),
        ("clip_frames", 0), ("name", 3), ("flag", 1), ("mode", "slow"), ("mode", True),
        ("mode", []), ("levels", 8), ("levels", [8, "5"]), ("pair", [1]), ("pair", ["a", 1]),
        ("limit", "3"), ("either", 1.5), ("inner", 3), ("inner", {}), ("inner", {"dim": 4.0}),
        ("inner", {"dim": 4, "rate": "1"}), ("inner", {"dim": 4, "rate": 10**400}), ("extra", []),
        ("inner", Outer(output=Path("a"))),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"t: .*{key}"):
        build(Outer, {"output": "a", key: value}, where="t")


def test_a_files_own_error_class_is_raised_throughout():
    for data in ([], {}, {"dim": "x"}, {"dim": 1, "rat": 2}):
        with pytest.raises(FormatError, match=r"x\.json"):
            build(Inner, data, where="x.json", error=FormatError)


def test_a_word_of_a_literal_has_its_type_too():
    @dataclass(frozen=True)
    class Numbers:
        count: Literal[1, 2]

    assert build(Numbers, {"count": 2}, where="t").count == 2
    for value in (True, 1.0, "1"):
        with pytest.raises(ConfigError, match="count"):
            build(Numbers, {"count": value}, where="t")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a = ", "not readable as TOML"),
        (b"\xff", "not readable as TOML"),
        (b"a = 1\na = 2", "not readable as TOML"),
        (b"a = " + b"[" * 100_000, "not readable as TOML"),
        (b"a = " + b"9" * 5000, "not readable as TOML"),
        (b"#" * (2 << 20), "too large"),
    ],
)
def test_a_bad_toml_file_is_a_config_error_that_names_it(tmp_path, content, reason):
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_toml_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"c\.toml: not found"):
        read_toml(tmp_path / "c.toml")


def test_two_configs_are_told_apart_by_the_settings_that_differ():
    text = describe_difference(
        {"a": {"dim": 192, "x": 1}, "b": 2}, {"a": {"dim": 256, "x": 1}, "b": 2}
    )
    assert text == "a dim 192 then, 256 now"


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_10000_changed_tables_are_built_or_refused_with_their_name(mutations, may_refuse, seed):
    for data in mutations(WHOLE, seed=seed, count=50):
        with may_refuse(ConfigError, "t: "):
            built = build(Outer, data, where="t")
            assert isinstance(built.output, Path)
            assert type(built.clip_frames) is int
            assert type(built.inner.dim) is int


TOML = st.text("abc01.-=[]{}\"'#\n\t ,:eTZ_", max_size=60)


@settings(max_examples=2000)
@given(text=TOML)
def test_any_text_is_a_table_or_a_config_error(tmp_path, may_refuse, text):
    path = tmp_path / "c.toml"
    path.unlink(missing_ok=True)
    path.write_text(text)
    with may_refuse(ConfigError, f"{path}: ", "t: "):
        build(Inner, read_toml(path), where="t")
