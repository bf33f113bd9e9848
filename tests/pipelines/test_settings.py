"""settings.py: default < preset < file < flag, and nothing unknown is accepted."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from worldloom.common import ConfigError
from worldloom.pipelines import settings
from worldloom.pipelines.settings import parse, read_settings, stage_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes."""

    num_heads: int
    dim: int = 192
    """Width of the residual stream. A multiple of num_heads, which is a sentence too long
    for one line of this file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Do the work.

    worldloom tokenize --episodes data
    """

    episodes: Path
    """Folder of episodes."""
    rate: float = 3e-4
    """Learning rate."""
    resume: bool = True
    """Go on where it stopped."""
    model: Model = field(default_factory=lambda: Model(num_heads=6, dim=96))

    def __post_init__(self) -> None:
        if self.model.dim % self.model.num_heads:
            raise ConfigError(f"dim {self.model.dim} is no multiple of {self.model.num_heads}")


@pytest.fixture
def presets(tmp_path, monkeypatch):
    folder = tmp_path / "presets"
    folder.mkdir()
    monkeypatch.setattr(settings, "PRESETS", folder)
    (folder / "small.toml").write_text(
        '[tokenize]\nepisodes = "preset"\nrate = 1\n[tokenize.model]\ndim = 48\n[record]\n'
    )
    return folder


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def stage(*argv: str) -> Stage:
    return parse(Stage, argv, command="tokenize")


def test_a_flag_wins_over_the_file_the_file_over_the_preset_the_preset_over_the_default(
    tmp_path, presets
):
    file = write(tmp_path / "mine.toml", "[tokenize]\nrate = 2\n[tokenize.model]\nnum_heads = 3\n")
    assert stage("--episodes", "e") == Stage(episodes=Path("e"))
    assert stage("--preset", "small") == Stage(
        episodes=Path("preset"), rate=1.0, model=Model(num_heads=6, dim=48)
    )
    assert stage("--preset", "small", "--config", file) == Stage(
        episodes=Path("preset"), rate=2.0, model=Model(num_heads=3, dim=48)
    )
    assert stage("--config", file, "--preset=small", "--rate", "3", "--model.dim", "9") == Stage(
        episodes=Path("preset"), rate=3.0, model=Model(num_heads=3, dim=9)
    )


def test_a_boolean_has_a_flag_for_yes_and_one_for_no(presets):
    assert stage("--episodes", "e", "--resume").resume
    assert not stage("--episodes", "e", "--no-resume").resume


def test_a_config_that_contradicts_itself_only_before_the_flags_is_accepted(tmp_path):
    file = write(tmp_path / "mine.toml", "[tokenize.model]\nnum_heads = 5\n")
    assert stage("--config", file, "--episodes", "e", "--model.dim", "10").model.dim == 10
    with pytest.raises(ConfigError, match="dim 96 is no multiple of 5"):
        stage("--config", file, "--episodes", "e")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tokenise]\n", r"mine.toml: unknown table \[tokenise\]; did you mean 'tokenize'\?"),
        ("[tokenize]\nrat = 1\n", r"\[tokenize\]: unknown key 'rat'; did you mean 'rate'\?"),
        ("[tokenize]\nrate = 'x'\n", r"\[tokenize\]: rate must be float, got 'x'"),
        ("[tokenize.model]\ndmi = 1\n", r"\[tokenize.model\]: unknown key 'dmi'; .* 'dim'\?"),
        ("[tokenize]\nmodel = 3\n", r"\[tokenize.model\]: expected a table, got int"),
        ("[record]\n", r"has no table \[tokenize\], so it sets nothing .* it has \[record\]"),
        ("[tokenize\n", "mine.toml: not readable as TOML"),
    ],
)
def test_a_file_is_refused_with_its_name_the_table_and_the_nearest_key(tmp_path, text, message):
    file = write(tmp_path / "mine.toml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        stage("--config", file, "--episodes", "e")
    assert "mine.toml" in str(caught.value)


def test_a_preset_that_does_not_exist_is_refused_with_the_nearest(presets):
    with pytest.raises(ConfigError, match="--preset smal: no such preset; did you mean 'small'"):
        stage("--preset", "smal")


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--rat", "--rate"), ("--model.dmi=3", "--model.dim"), ("--no-resum", "--no-resume"),
     ("--confg", "--config")],
)  # fmt: skip
def test_a_misspelt_flag_is_refused_with_the_nearest_even_while_others_are_missing(flag, nearest):
    with pytest.raises(ConfigError, match=f"no such flag; did you mean {nearest}\\?"):
        stage(flag, "1")


@pytest.mark.parametrize("argv", [["--rate", "x", "--episodes", "e"], [], ["--config"]])
def test_a_value_that_is_wrong_or_missing_ends_with_2_and_says_which_on_stderr(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        stage(*argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert (argv or ["--episodes"])[0] in printed.err
    assert printed.out == ""


def test_the_help_shows_every_flag_its_meaning_and_its_default(capsys, monkeypatch, presets):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        stage("--preset", "small", "--help")
    shown = capsys.readouterr().out
    words = " ".join(shown.replace("│", " ").split())
    assert ended.value.code == 0
    assert "worldloom tokenize --episodes data" in words
    for promised in (
        "--episodes PATH Folder of episodes. (default: preset)",
        "--rate FLOAT Learning rate. (default: 1.0)",
        "--resume, --no-resume Go on where it stopped. (default: True)",
        "sentence too long for one line of this file. (default: 48)",
        "--preset NAME",
        "--config FILE.toml",
    ):
        assert promised in words
    assert max(map(len, shown.splitlines())) <= 80
    # A paragraph a field: wrapped to the terminal, not where the source file wraps.
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        stage("--help")
    assert "too long for one line of this file." in capsys.readouterr().out


def test_a_stage_is_built_from_its_table_and_what_the_caller_fills_in(presets):
    table, where = read_settings(presets / "small.toml")["tokenize"]
    built = stage_config(Stage, table, where=where, episodes=Path("mine"))
    assert built == Stage(episodes=Path("mine"), rate=1.0, model=Model(num_heads=6, dim=48))
    assert where == "presets/small.toml [tokenize]"


def test_a_stage_whose_table_lacks_or_misspells_a_key_is_refused_by_name():
    with pytest.raises(ConfigError, match="here: key 'episodes' is missing"):
        stage_config(Stage, {}, where="here")
    with pytest.raises(ConfigError, match="here: unknown key 'rat'; did you mean 'rate'"):
        stage_config(Stage, {"rat": 1}, where="here", episodes=Path("e"))
    with pytest.raises(ConfigError, match="unknown key 'episode'; did you mean 'episodes'"):
        stage_config(Stage, {}, where="here", episode=Path("e"), episodes=Path("e"))
