"""Promises of report.py: one page that needs nothing else, and the numbers under stable keys."""

import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from worldloom.common import ActionSpec, EpisodesSpec, EpisodeWriter, FormatError, RunLog
from worldloom.pipelines.charts import Line, chart_png, chart_svg
from worldloom.pipelines.report import write_report

VOID = {"meta", "link", "img", "source", "br", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, every attribute kept."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def demo_run(tiny_chain, evaluated, tmp_path):
    """A demo run's folder: real episodes, shards and evaluation, two training logs."""
    run = tmp_path / "demo"
    run.mkdir()
    (run / "episodes").symlink_to(tiny_chain.folder / "episodes")
    (run / "shards").symlink_to(tiny_chain.folder / "shards")
    (run / "evaluation").symlink_to(evaluated.folder)
    for stage in ("tokenizer", "dynamics"):
        log = RunLog(run / stage, config={"seed": 0})
        for step in (20, 40, 60):
            log.metrics(step, loss=1 / step, psnr_db=20 + step / 10, codes_used=0.5)
        log.metrics(60, validation_psnr_db=26.0, validation_loss=0.1, copy_accuracy=0.2)
    stages = {"record": {"seconds": 3.25}, "train-tokenizer": {"seconds": 130.4, "finished": True}}
    (run / "stages.json").write_text(json.dumps(stages))
    return run


def write(run):
    return write_report(run, title="A <tiny> world", commands=["worldloom demo --output 'a & b'"])


def test_the_page_loads_nothing_from_elsewhere(demo_run):
    text = write(demo_run).read_text()
    page = Page(text)
    for tag, attrs in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            if attrs.get(name):
                assert attrs[name].startswith(("data:", "#")), (tag, name, attrs[name][:60])
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_every_picture_has_a_text_for_those_who_cannot_see_it(demo_run):
    page = Page(write(demo_run).read_text())
    pictures = page.all("img")
    # hero, recorded, reconstructions, three held actions, three rollouts
    assert len(pictures) == 9
    assert all(len(attrs["alt"]) > 10 for attrs in pictures)
    charts = page.all("svg")
    assert len(charts) == 5
    assert all(len(attrs["aria-label"]) > 10 and attrs["role"] == "img" for attrs in charts)
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_id_of_the_page_stands_once(demo_run):
    """Charts made apart are put on one page, and refer to parts of themselves by id."""
    text = write(demo_run).read_text()
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    referred = re.findall(r"url\(#([^)]+)\)", text)
    referred += [a["xlink:href"][1:] for a in page.all("use")]
    assert set(referred) <= set(ids)


def test_moving_pictures_stand_still_for_those_who_ask(demo_run):
    page = Page(write(demo_run).read_text())
    gifs = [a for a in page.all("img") if a["src"].startswith("data:image/gif")]
    stills = [a for a in page.all("source") if "prefers-reduced-motion" in a["media"]]
    assert len(gifs) == len(stills) == 4
    assert all(attrs["srcset"].startswith("data:image/png") for attrs in stills)


def test_the_page_says_what_the_numbers_say(demo_run, evaluated):
    text = Page(write(demo_run).read_text()).text
    numbers = evaluated.numbers
    for value in (
        f"{numbers['tokenizer']['psnr_db']:.2f} dB",
        f"{numbers['dynamics']['cross_entropy']:.2f} nats",
        f"{100 * numbers['dynamics']['copy_accuracy']:.1f}%",
        f"{numbers['rollout']['psnr_over_copy_db']:+.2f} dB",
        f"{numbers['rollout']['delta_psnr_db']:+.2f} dB",
        f"{numbers['play']['frames_per_s']:.1f} frames/s",
    ):
        assert value in text
    assert "worldloom demo --output 'a & b'" in text
    assert "2\xa0min 10\xa0s" in text
    assert all(name in text for name in ("STAY", "LEFT", "RIGHT", "A <tiny> world"))


def test_names_from_files_cannot_become_markup(demo_run, tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    folder = tmp_path / "evil"
    folder.mkdir()
    spec = EpisodesSpec(
        actions=ActionSpec.discrete([evil, "b"]), height=16, width=16, fps=5.0, frame_skip=1,
        source={"env": "<script>alert(2)</script>"},
    )  # fmt: skip
    spec.write(folder)
    with EpisodeWriter(folder, "one", spec=spec) as writer:
        for _ in range(3):
            writer.append(np.zeros((16, 16, 3), np.uint8))
        writer.finish(np.array([0, 1]))
    (demo_run / "episodes").unlink()
    (demo_run / "episodes").symlink_to(folder)
    page = Page(write(demo_run).read_text())
    assert not page.all("script")
    assert all(attrs["src"].startswith("data:") for attrs in page.all("img"))
    assert evil in page.text


def test_report_json_holds_the_numbers_and_the_seconds_under_stable_keys(demo_run, evaluated):
    write(demo_run)
    report = json.loads((demo_run / "report.json").read_text())
    for group in ("tokenizer", "dynamics", "rollout", "play"):
        assert report[group] == evaluated.numbers[group]
    assert report["stages"]["record"]["seconds"] == 3.25
    assert report["stages"]["train-tokenizer"] == {"seconds": 130.4}


def test_the_same_run_gives_the_same_page(demo_run):
    first = write(demo_run).read_bytes()
    assert write(demo_run).read_bytes() == first


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("evaluation", "worldloom evaluate"),
        ("stages.json", "stages"),
        ("shards", "worldloom tokenize"),
        ("episodes", "worldloom record"),
        ("dynamics/metrics.jsonl", "metrics of a run"),
    ],
)
def test_a_missing_stage_is_named_and_no_page_is_written(demo_run, missing, says):
    (demo_run / missing).unlink()
    with pytest.raises(FormatError, match=says):
        write(demo_run)
    assert not (demo_run / "report.html").exists()


def test_an_evaluation_that_lacks_a_number_is_refused(demo_run, evaluated, tmp_path):
    copy = tmp_path / "evaluation"
    copy.mkdir()
    numbers = {**evaluated.numbers, "play": {}}
    (copy / "evaluation.json").write_text(json.dumps(numbers))
    for path in evaluated.folder.iterdir():
        if path.suffix in (".png", ".gif"):
            (copy / path.name).symlink_to(path)
    (demo_run / "evaluation").unlink()
    (demo_run / "evaluation").symlink_to(copy)
    with pytest.raises(FormatError, match="frames_per_s"):
        write(demo_run)


LINES = [
    Line(name="model", x=[1, 2, 3], y=[3.0, 2.0, 1.5]),
    Line(name="copy", x=[1, 2, 3], y=[2.0, 1.0, 0.5], dashed=True),
]


def test_a_chart_takes_its_colours_and_font_from_the_page():
    svg = chart_svg(LINES, x_label="frame", y_label="dB", describe="two curves")
    assert not re.search(r"#[0-9a-f]{6}\b|DejaVu|<style|<metadata", svg)
    assert {"var(--ink)", "var(--series-1)", "var(--series-2)"} <= set(
        re.findall(r"var\([^)]*\)", svg)
    )
    for text in ("model", "copy", "frame", "dB"):
        assert f">{text}</text>" in svg


def test_a_chart_of_nothing_is_refused():
    for lines in ([], [Line(name="empty", x=[], y=[])], LINES * 3):
        with pytest.raises(ValueError, match="1 to 4 lines"):
            chart_png(lines, x_label="x", y_label="y")
