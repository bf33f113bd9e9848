"""demo.py: stages are kept, continued or refused; the report has every number."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_server import quiet_environment
from worldloom.common import ConfigError, FormatError, read_json
from worldloom.pipelines.demo import STAGES, DemoConfig, demo
from worldloom.pipelines.settings import preset_path

SMOKE = preset_path("smoke")
STABLE_KEYS = (
    "tokenizer.psnr_db", "tokenizer.moving_psnr_db", "tokenizer.codes_used_fraction",
    "dynamics.cross_entropy", "dynamics.free_running_accuracy", "dynamics.copy_accuracy",
    "rollout.psnr_over_copy_db", "rollout.delta_psnr_db", "play.frames_per_s",
    *(f"stages.{name}.seconds" for name in STAGES),
)  # fmt: skip


@pytest.fixture(scope="module")
def smoke(commands, tmp_path_factory):
    """The preset as people run it, stopped once by Ctrl-C on the way: folder, first and second."""
    for attempt in range(3):
        run = tmp_path_factory.mktemp("demo") / f"smoke-{attempt}"
        words = ("demo", "--preset", "smoke", "--output", run)
        first = commands.start(*words)
        while not (run / "tokenizer/LATEST").exists() and first.is_running():
            time.sleep(0.01)
        first.send(signal.SIGINT)
        stopped = first.wait()
        assert stopped.code in (0, 130), stopped.err
        stages = read_json(run / "stages.json", what="stages")
        # The rest of that training takes a second, which a busy machine may let pass.
        if not stages["train-tokenizer"]["finished"]:
            break
    assert stopped.code == 130, stopped.err
    # From nothing this time: each stage must bring along what it needs.
    second = subprocess.run(
        [sys.executable, "-m", "worldloom.pipelines", *map(str, words)],
        env=quiet_environment(),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    return run, (stopped.out, stopped.err, stages), (second.stdout, second.stderr)


def changed(tmp_path, old, new):
    """A copy of the preset with one line changed."""
    text = SMOKE.read_text()
    assert text.count(old) == 1
    path = tmp_path / "changed.toml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_continues_and_so_it_does(smoke):
    _, (out, err, stages), (_, later) = smoke
    assert out == ""
    assert "the same command" in err.splitlines()[-1]
    assert (stages["record"]["finished"], stages["train-tokenizer"]["finished"]) == (True, False)
    assert set(stages) == {"record", "train-tokenizer"}
    assert "[1/5] record: done before" in later
    assert re.search(r"from update [1-9]", later)


@pytest.mark.slow
def test_the_report_has_every_stable_key_and_each_is_a_finite_number(smoke):
    run, _, (out, _) = smoke
    assert out == f"{run / 'report.html'}\n"
    report = json.loads((run / "report.json").read_text())
    for key in STABLE_KEYS:
        value = report
        for part in key.split("."):
            value = value[part]
        assert isinstance(value, int | float), key
        assert math.isfinite(value), key
    stages = read_json(run / "stages.json", what="stages")
    for name in STAGES:
        assert report["stages"][name]["seconds"] == stages[name]["seconds"] > 0
        assert stages[name]["finished"]


@pytest.mark.slow
def test_the_page_opens_from_disk_alone_and_names_the_game(smoke):
    run, _, _ = smoke
    page = (run / "report.html").read_text()
    assert "<h1>A world learned from VizdoomBasic-v1</h1>" in page
    assert f"worldloom demo --preset smoke --output {run}" in page
    for attribute, target in re.findall(r"""\b(src|href|srcset)\s*=\s*["']([^"']*)""", page):
        assert target.startswith(("data:", "#")), (attribute, target[:80])
    assert not re.search(r"url\((?!['\"]?(?:data:|#))", page)
    # Namespaces of SVG are names; nothing is fetched from them.
    fetched = re.sub(r"""xmlns(?::\w+)?=["'][^"']*["']""", "", page)
    assert not re.search(r"https?://", fetched)
    assert page.count("data:image/gif;base64,") >= 2


@pytest.mark.slow
def test_the_stages_stand_in_the_page_in_the_order_of_the_data(smoke):
    page = (smoke[0] / "report.html").read_text()
    section = page[page.index("Where the time went") :]
    places = [section.index(name) for name in STAGES]
    assert places == sorted(places)


@pytest.mark.slow
def test_run_again_it_keeps_every_finished_stage_and_remakes_what_was_taken_away(
    smoke, commands, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(smoke[0], run)
    (run / "report.html").unlink()
    shutil.rmtree(run / "evaluation")
    before = read_json(run / "stages.json", what="stages")
    models = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    again = commands.run("demo", "--preset", "smoke", "--output", run)
    assert again.code == 0, again.err
    assert re.findall(r"\] (\S+): done before", again.err) == list(STAGES[:4])
    assert "[5/5] evaluate: finished" in again.err
    after = read_json(run / "stages.json", what="stages")
    assert {name: after[name] for name in STAGES[:4]} == {name: before[name] for name in STAGES[:4]}
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == models
    numbers = [read_json(at / "report.json", what="a report") for at in (smoke[0], run)]
    for group in ("tokenizer", "dynamics", "rollout"):
        assert numbers[0][group] == numbers[1][group]
    assert (run / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "horizon = 6",
            "horizon = 5",
            "its stage evaluate was made with other settings (horizon 6",
        ),
        ("max_frames = 40", "max_frames = 41", "its stage record was made with other settings"),
    ],
)
def test_a_finished_stage_with_other_settings_is_refused_before_anything_runs(
    smoke, commands, tmp_path, old, new, said
):
    run, _, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    ended = commands.run("demo", "--config", changed(tmp_path, old, new), "--output", run)
    assert ended.code == 3
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("held_frames = 8", "held_frame = 8", r"\[evaluate\].*held_frame.*held_frames"),
        ("num_heads = 2", "num_heads = 3", r"\[train_dynamics"),
        ("[tokenize]\n", "[tokenise]\n", r"did you mean 'tokenize'"),
        ("[tokenize]\n", "[tokenize]\noutput = 'x'\n", r"output follows from --output"),
        ('[tokenize]\nshard_episodes = 8\ndevice = "cpu"\n', "", r"no table \[tokenize\]"),
    ],
)
def test_a_mistake_in_the_last_table_is_found_before_the_first_stage_begins(
    tmp_path, old, new, said
):
    path = changed(tmp_path, old, new)
    with pytest.raises(ConfigError, match=said):
        demo(DemoConfig(config=path, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_unknown_preset_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        demo(DemoConfig(preset="smoky", output=tmp_path / "run"))


def test_the_notes_of_something_else_are_refused_by_name(tmp_path):
    (tmp_path / "stages.json").write_text('{"record": {"seconds": "long"}}')
    with pytest.raises(FormatError, match=r"stages\.json: record"):
        demo(DemoConfig(preset="smoke", output=tmp_path))


@pytest.mark.slow
def test_a_stage_that_fails_leaves_the_finished_ones_which_are_kept(commands, tmp_path):
    text = SMOKE.read_text().replace('"VizdoomBasic-v1"', '"worlds:LastAction-v0"')
    text = text.replace("clip_frames = 4", "clip_frames = 400")
    path = Path(tmp_path / "failing.toml")
    path.write_text(text)
    for attempt in range(2):
        ended = commands.run("demo", "--config", path, "--output", tmp_path / "run")
        assert ended.code == 3
        assert "no episode has 400 frames" in ended.err.splitlines()[-1]
        assert "[2/5] train-tokenizer: stopped after" in ended.err
        assert ("[1/5] record: done before" in ended.err) == bool(attempt)
    stages = read_json(tmp_path / "run/stages.json", what="stages")
    assert {name: stage["finished"] for name, stage in stages.items()} == {
        "record": True,
        "train-tokenizer": False,
    }
