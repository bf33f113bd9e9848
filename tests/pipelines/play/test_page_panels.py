"""The page in a real Chromium: starts, pictures, settings, pace, recordings, comparisons."""

import io
import json
import time

import av
import numpy as np
import pytest
from PIL import Image
from pipelines.play.browser import SAMPLING


@pytest.fixture
def played(steer_world, serve, visit):
    """A world of four choices, and the page that plays it."""
    served = serve(steer_world)
    played = visit(served.url)
    played.served = served
    return played


def picture_file(kind: str = "PNG", *, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture that is no frame of the world."""
    content = io.BytesIO()
    colours = np.random.default_rng(5).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(colours).save(content, kind)
    return content.getvalue()


def test_every_start_of_the_gallery_is_shown_and_begins_there(played):
    starts = played.page.locator("#gallery button")
    assert starts.count() == 3
    for index in (2, 1):
        starts.nth(index).click()
        played.page.wait_for_selector(f"#gallery button:nth-child({index + 1})[aria-pressed=true]")
        assert played.page.locator("#gallery [aria-pressed=true]").count() == 1
        expected = played.picture(f"/start/{index}.png")
        played.until(lambda expected=expected: np.array_equal(played.pixels(), expected))
        start, steps = played.served.past()
        assert start.start in starts.nth(index).get_attribute("title")
        assert steps == []
    sizes = played.page.evaluate(
        "Promise.all([...document.querySelectorAll('#gallery img')].map("
        "  async (image) => { await image.decode(); return image.naturalWidth; }))"
    )
    assert sizes == [16, 16, 16]


@pytest.mark.parametrize("way", ["button", "drop", "webp"])
def test_a_picture_of_ones_own_is_a_start(played, way):
    before, _ = played.served.past()
    kind = "WEBP" if way == "webp" else "PNG"
    content = picture_file(kind)
    name = f"mine.{kind.lower()}"
    if way == "drop":
        played.page.evaluate(
            """([bytes, name]) => {
              const files = new DataTransfer();
              files.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
              const event = (kind) => new DragEvent(kind, { dataTransfer: files, bubbles: true });
              document.body.dispatchEvent(event("dragover"));
              if (document.getElementById("drop").hidden) throw new Error("nothing says drop");
              document.body.dispatchEvent(event("drop"));
            }""",
            [list(content), name],
        )
    else:
        with played.page.expect_file_chooser() as chooser:
            played.page.click("#upload")
        chooser.value.set_files(
            {"name": name, "mimeType": f"image/{kind.lower()}", "buffer": content}
        )
    played.until(lambda: played.served.past()[0].start != before.start)
    assert played.page.locator("#drop").is_hidden()
    start, _ = played.served.past()
    assert start.codes_thw.shape[0] == 1
    assert not np.array_equal(start.codes_thw[0], before.codes_thw[-1])
    played.page.keyboard.press("Period")
    played.wait_for_position(1)
    codes, frames = played.served.played_anew([played.served.past()[1][0].slots_rA])
    assert np.array_equal(codes[0], played.served.past()[1][0].codes_hw)
    assert np.array_equal(played.pixels(), frames[0])


def test_what_is_no_picture_is_refused_in_a_sentence_and_play_goes_on(played):
    for name, kind, content in (
        ("notes.txt", "text/plain", b"not a picture"),
        ("broken.png", "image/png", b"\x89PNG\r\n\x1a\n and then nothing"),
    ):
        played.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})
        alert = played.page.locator("#notice-error")
        alert.wait_for()
        assert alert.get_attribute("role") == "alert"
        assert "picture" in alert.inner_text()
        alert.get_by_label("Dismiss").click()
    played.page.keyboard.press("Period")
    played.wait_for_position(1)


def test_settings_reach_the_next_step_and_come_back_on_a_rewind(played):
    page = played.page
    assert page.input_value("#setting-temperature") == str(SAMPLING.temperature).removesuffix(".0")
    page.keyboard.press("Period")
    played.wait_for_position(1)
    page.focus("#setting-temperature")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.focus("#setting-min_p")
    page.keyboard.press("End")
    page.select_option("#setting-decoder", "raster")
    played.until(lambda: page.evaluate("sending === 0"))
    page.click("#step")
    played.wait_for_position(2)
    events = (played.served.log / "events.jsonl").read_text().splitlines()
    (settings,) = [
        json.loads(line)["sampling"] for line in events if json.loads(line)["event"] == "settings"
    ]
    assert settings["temperature"] == pytest.approx(SAMPLING.temperature + 0.2)
    assert (settings["min_p"], settings["decoder"]) == (1, "raster")
    page.wait_for_timeout(700)  # longer than a slider keeps its own word against the server's
    page.focus("#stage")
    page.keyboard.press("Comma")
    page.keyboard.press("Comma")
    played.until(lambda: page.inner_text("#position") == "0 / 2")
    played.until(lambda: page.inner_text("#setting-temperature-value") == "1")
    assert page.input_value("#setting-temperature") == "1"
    assert page.input_value("#setting-decoder") != "raster"


def test_a_world_without_actions_goes_on_by_itself_and_has_nothing_to_guide(
    still_world, serve, visit
):
    played = visit(serve(still_world).url)
    assert "no actions" in played.page.inner_text("#keys")
    assert played.page.locator("#setting-guidance_scale").is_disabled()
    described = played.page.get_attribute("#setting-guidance_scale", "aria-describedby")
    assert "no actions" in played.page.inner_text(f"#{described}")
    played.page.click("#begin")
    played.wait_for_position(3)


def test_the_pace_is_the_game_s_twice_that_or_as_fast_as_it_can(played):
    page = played.page
    assert page.locator("#pace input:checked").get_attribute("value") == "20"
    page.locator("#pace label", has_text="Fastest").click()
    page.keyboard.press("p")
    played.wait_for_position(5)

    def is_faster_than_the_game():
        began, before = time.monotonic(), len(played.served.done())
        page.wait_for_timeout(500)
        after = len(played.served.done())
        return after - before > 1.5 * 20 * (time.monotonic() - began)

    played.until(is_faster_than_the_game)  # a busy machine may need more than one look
    played.pause()
    assert page.locator("#pace input:checked").get_attribute("value") == "0"


def test_a_recording_is_an_mp4_that_decodes_and_the_actions_that_were_done(played):
    page = played.page
    page.click("#record")
    page.wait_for_selector("#recording-badge:visible")
    played.press("ArrowLeft", until=lambda: played.served.done()[-5:] == 5 * ["LEFT"])
    played.pause()
    page.click("#record")
    page.wait_for_selector("#recordings li")
    done = played.served.done()
    with page.expect_download() as video:
        page.click("#notice-recorded button:has-text('Save')")
    with av.open(str(video.value.path())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 1 + len(done)
    assert frames[0].shape[0] % 16 == 0
    first = played.picture("/start/0.png")
    scale = frames[0].shape[0] // 16
    assert np.abs(frames[0][::scale, ::scale].astype(int) - first).mean() < 25
    with page.expect_download() as actions:
        page.click("#recordings a:has-text('Actions')")
    words = json.loads(actions.value.path().read_text())
    spelled = [word for item in words for word in _spelled(item)]
    assert spelled == done


def _spelled(item: str) -> list[str]:
    word, _, times = item.partition("*")
    return [word] * int(times or 1)


def test_what_truly_happened_runs_beside_it_until_there_is_no_more(played):
    page = played.page
    page.locator("#gallery button").nth(2).click()  # the last start of the episode: 4 steps to go
    page.wait_for_selector("#gallery button:nth-child(3)[aria-pressed=true]")
    page.locator("#compare label", has_text="What happened").click()
    page.wait_for_selector("#companion:visible")
    # A frame from before says for a moment that there is no more.
    played.until(lambda: page.inner_text("#companion-caption") == "What truly happened")
    boxes = [page.locator(name).bounding_box() for name in ("#canvas", "#companion-canvas")]
    assert boxes[0]["width"] == boxes[1]["width"] > 0
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    beside = []
    for _ in range(7):
        before = played.position
        page.click("#step")
        played.wait_for_position(before + 1)
        beside.append(played.pixels("#companion-canvas"))
        if "no more" in page.inner_text("#companion-caption"):
            break
    assert "no more" in page.inner_text("#companion-caption")
    assert not np.array_equal(beside[0], beside[1])
    page.locator("#compare label", has_text="Nothing").click()
    page.wait_for_selector("#companion", state="hidden")
