"""Promises of runlog.py: metrics come back, a torn line harms nothing, stdout stays empty."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from worldloom.common import (
    ConfigError,
    FormatError,
    RunLog,
    StorageError,
    build,
    environment,
    format_metrics,
    progress,
    read_metrics,
    read_toml,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    output: Path
    num_steps: int = 3


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path / "run", config=Config(output=tmp_path / "run"))


def test_metrics_come_back_row_by_row(log):
    log.metrics(1, loss=0.1, tokens=100)
    log.metrics(2, loss=np.float32(0.25), psnr=float("inf"), bad=float("nan"))
    assert read_metrics(log.run) == [
        {"step": 1, "loss": 0.1, "tokens": 100},
        {"step": 2, "loss": 0.25, "psnr": None, "bad": None},
    ]


def test_a_torn_last_line_is_left_out_and_the_next_run_is_not_glued_to_it(log):
    log.metrics(1, loss=0.5)
    path = log.run / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(log.run) == [{"step": 1, "loss": 0.5}]
    again = RunLog(log.run, config=Config(output=log.run))
    again.metrics(2, loss=0.25)
    assert [row["step"] for row in read_metrics(log.run)] == [1, 2]


def test_a_line_that_is_torn_elsewhere_is_refused_by_number(log):
    log.metrics(1, loss=0.5)
    with (log.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(FormatError, match=r"metrics\.jsonl: line 2"):
        read_metrics(log.run)


def test_metrics_after_a_step_are_forgotten_and_those_before_stay(log):
    log.forget_after(0)  # nothing there yet
    for step in (1, 2, 3, 4):
        log.metrics(step, loss=1 / step)
    before = (log.run / "metrics.jsonl").read_text().splitlines()
    log.forget_after(2)
    assert (log.run / "metrics.jsonl").read_text().splitlines() == before[:2]
    log.metrics(3, loss=0.5)
    assert [row["step"] for row in read_metrics(log.run)] == [1, 2, 3]


def test_a_run_without_metrics_is_a_format_error(tmp_path):
    with pytest.raises(FormatError, match="not found; expected the metrics of a run"):
        read_metrics(tmp_path)


def test_the_settings_and_versions_of_a_run_are_kept(log):
    saved = build(Config, read_toml(log.run / "config.toml"), where="config.toml")
    assert saved == Config(output=log.run)
    assert json.loads((log.run / "env.json").read_text()) == environment()
    assert environment()["versions"]["numpy"] == np.__version__


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(log):
    (log.run / "tmp-77-model").mkdir()
    (log.run / "tmp-77-model/model.safetensors").write_bytes(b"half")
    (log.run / "samples").mkdir()
    (log.run / "samples/tmp-77-step.png").write_bytes(b"half")
    (log.run / "samples/step.png").write_bytes(b"whole")
    (log.run / "model").mkdir()
    RunLog(log.run, config={})
    left = {str(path.relative_to(log.run)) for path in log.run.rglob("*")}
    assert left == {"config.toml", "env.json", "model", "samples", "samples/step.png"}


def test_words_go_to_stderr_and_the_log_and_never_to_stdout(log, capsys):
    log.say("encoding [bold]9[/bold] of 10")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "encoding [bold]9[/bold] of 10\n"
    stamp, text = (log.run / "log.txt").read_text().split("Z ")[0][:19], captured.err
    assert len(stamp) == 19
    assert (log.run / "log.txt").read_text().endswith(text)


def test_a_run_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        RunLog(tmp_path / "file" / "run", config=Config(output=tmp_path))


def test_progress_yields_every_item_once_and_says_so_on_stderr_only(capsys):
    assert list(progress([3, 1, 2], "encoding")) == [3, 1, 2]
    assert list(progress(iter("ab"), "reading", total=5, done=3)) == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "encoding: 3 of 3\nreading: 5 of 5\n"


def test_metrics_are_said_short():
    assert format_metrics({"loss": 0.123456, "psnr": 27.1}) == "loss 0.1235  psnr 27.1"


@pytest.mark.parametrize("stranger", ["config.toml", "episodes.json", "tmp-thesis"])
def test_a_folder_that_is_no_run_is_refused_untouched(tmp_path, stranger):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / stranger).write_text("mine")
    with pytest.raises(ConfigError, match=rf"home: has '{stranger}' but no env.json"):
        RunLog(folder, config=Config(output=folder))
    assert [path.name for path in folder.iterdir()] == [stranger]
    assert (folder / stranger).read_text() == "mine"


def test_a_run_is_known_again_even_if_it_was_killed_at_its_first_file(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tmp-7-env.json").write_text("{")
    for _ in range(2):
        RunLog(run, config=Config(output=run))
        assert sorted(path.name for path in run.iterdir()) == ["config.toml", "env.json"]
