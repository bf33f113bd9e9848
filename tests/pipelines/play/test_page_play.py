"""The page in a real Chromium: what is pressed is what the world does, and what it does is seen."""

from itertools import groupby, pairwise

import numpy as np
import pytest


def ends_with(served, *actions: str):
    """Return whether these were done last, asked when it is called."""
    return lambda: served.done()[-len(actions) :] == list(actions)


def changes(done: list[str]):
    """What was done, each stretch of the same once."""
    return [action for action, _ in groupby(done)]


def test_a_held_key_plays_what_world_step_plays_code_for_code(steer_world, serve, visit):
    served = serve(steer_world, seed=3)
    played = visit(served.url)
    played.press("ArrowLeft", until=ends_with(served, *6 * ["LEFT"]))
    played.press("ArrowRight", until=ends_with(served, *4 * ["RIGHT"]))
    end = played.pause()
    start, steps = served.past()
    assert start.seed == 3
    assert len(steps) == end
    assert [action for action in changes(served.done()) if action != "STAY"] == ["LEFT", "RIGHT"]
    codes, frames = served.played_anew([step.slots_rA for step in steps])
    assert all(
        np.array_equal(step.codes_hw, alone) for step, alone in zip(steps, codes, strict=True)
    )
    assert np.array_equal(played.pixels(), frames[-1])
    assert any(not np.array_equal(before, after) for before, after in pairwise(frames))


def test_another_seed_is_another_future(steer_world, serve, visit):
    served = serve(steer_world)
    played = visit(served.url)
    futures = []
    for seed in ("7", "8", "7"):
        played.page.fill("#seed", seed)
        played.page.keyboard.press("Enter")
        played.page.wait_for_selector("#begin:visible")
        for _ in range(4):
            before = played.position
            played.page.click("#step")
            played.wait_for_position(before + 1)
        start, steps = served.past()
        assert start.seed == int(seed)
        futures.append([step.codes_hw.tolist() for step in steps])
    assert futures[0] == futures[2] != futures[1]


def test_a_tap_shorter_than_a_frame_is_a_step_of_its_own(steer_world, serve, visit):
    served = serve(steer_world, pace=5.0)
    played = visit(served.url)
    played.page.click("#begin")
    played.wait_for_position(1)
    for taps in (1, 2, 3):
        played.page.keyboard.press("ArrowLeft")  # down and up within a millisecond
        wanted = ["STAY", *taps * ["LEFT", "STAY"]]
        played.until(lambda wanted=wanted: changes(served.done()) == wanted)
    played.pause()
    assert changes(served.done()) == wanted


def test_two_keys_are_held_at_once_and_a_third_pushes_the_oldest_out(keys_world, serve, visit):
    served = serve(keys_world)
    played = visit(served.url)
    keyboard = played.page.keyboard
    for down, now in (("ArrowLeft", "left"), ("ArrowUp", "up+left"), ("Space", "up+fire")):
        keyboard.down(down)
        played.until(ends_with(served, now, now))
    for up, now in (("ArrowUp", "left+fire"), ("ArrowLeft", "fire"), ("Space", "none")):
        keyboard.up(up)
        played.until(ends_with(served, now, now))
    assert changes(served.done()) == ["left", "up+left", "up+fire", "left+fire", "fire", "none"]


def test_with_one_choice_at_a_time_the_newest_key_wins_and_then_the_older_again(
    steer_world, serve, visit
):
    served = serve(steer_world)
    played = visit(served.url)
    with_left = ends_with(served, *3 * ["LEFT"])
    played.page.keyboard.down("ArrowLeft")
    played.until(with_left)
    played.press("ArrowRight", until=ends_with(served, *3 * ["RIGHT"]))
    played.until(with_left)
    played.page.keyboard.up("ArrowLeft")
    played.until(ends_with(served, "STAY"))
    assert changes(served.done()) == ["LEFT", "RIGHT", "LEFT", "STAY"]


@pytest.mark.parametrize("leave", ["blur", "hidden", "field", "menu"])
def test_who_looks_elsewhere_holds_nothing(steer_world, serve, visit, leave):
    served = serve(steer_world)
    played = visit(served.url)
    played.page.keyboard.down("ArrowLeft")
    played.until(ends_with(served, "LEFT"))
    held = played.page.locator(".key.held")
    assert held.count() == 1
    if leave == "blur":
        played.page.evaluate("dispatchEvent(new Event('blur'))")
    elif leave == "menu":  # takes the keys, and the window keeps the focus
        played.page.click("#canvas", button="right")
    elif leave == "hidden":
        played.page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
    else:
        played.page.focus("#seed")
    held.wait_for(state="hidden")
    played.until(ends_with(served, "STAY", "STAY"))


def test_keys_on_the_screen_are_pressed_by_the_mouse(keys_world, serve, visit):
    served = serve(keys_world)
    played = visit(served.url)
    key = played.page.locator(".key[data-name=left]")
    key.hover()
    played.page.mouse.down()
    played.until(ends_with(served, "left"))
    assert key.get_attribute("aria-pressed") == "true"
    played.page.mouse.move(5, 5)  # a finger that slips off still holds
    played.until(ends_with(served, *4 * ["left"]))
    played.page.mouse.up()
    played.until(ends_with(served, "none"))
    for now in ("up", "none"):  # with Shift it stays down until the next time
        played.page.locator(".key[data-name=up]").click(modifiers=["Shift"])
        played.until(ends_with(served, *4 * [now]))


def test_two_fingers_hold_two_keys(keys_world, serve, visit):
    served = serve(keys_world)
    played = visit(served.url, has_touch=True, viewport={"width": 390, "height": 844})
    points = []
    for name in ("right", "fire"):
        box = played.page.locator(f".key[data-name={name}]").bounding_box()
        points.append({"x": box["x"] + 10, "y": box["y"] + 10, "id": len(points)})
    touch = played.page.context.new_cdp_session(played.page)
    for fingers in (points[:1], points):
        touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": fingers})
    played.until(ends_with(served, *3 * ["right+fire"]))
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    played.until(ends_with(served, "none"))


def test_paused_it_stands_still_and_a_step_is_one_frame_with_what_is_held(
    steer_world, serve, visit
):
    served = serve(steer_world)
    played = visit(served.url)
    played.press("ArrowLeft", until=ends_with(served, "LEFT"))
    end = played.pause()
    played.page.keyboard.down("ArrowRight")
    assert played.settle() == end
    played.page.keyboard.press("Period")
    played.wait_for_position(end + 1)
    played.page.keyboard.up("ArrowRight")
    played.page.click("#step")
    played.wait_for_position(end + 2)
    assert played.settle() == end + 2
    assert served.done()[-2:] == ["RIGHT", "STAY"]


def test_going_back_and_pressing_the_same_gives_the_same_codes_and_another_key_branches(
    steer_world, serve, visit
):
    served = serve(steer_world)
    played = visit(served.url)
    shown = [played.pixels()]
    keys = ["ArrowLeft", "ArrowLeft", "ArrowRight", "Space", "ArrowLeft", "ArrowRight"]

    def step(key):
        before = played.position
        played.page.keyboard.down(key)
        played.page.keyboard.press("Period")
        played.wait_for_position(before + 1)
        played.page.keyboard.up(key)

    played.page.click("#begin")
    played.wait_for_position(1)
    begun = played.pause()
    for key in keys:
        step(key)
        shown.append(played.pixels())
    slider = played.page.locator("#rewind")
    slider.evaluate(
        "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }",
        begun + 2,
    )
    played.page.wait_for_selector(f"text=Frame {begun + 2} of {begun + 6}")
    played.settle()
    assert np.array_equal(played.pixels(), shown[2])
    for number, key in enumerate(keys[2:4], start=3):
        step(key)
        assert np.array_equal(played.pixels(), shown[number])
    for key in ("ArrowRight", "ArrowRight"):  # not what was pressed there
        step(key)
    assert played.page.inner_text("#position") == f"{begun + 6} / {begun + 6}"
    _, steps = served.past()
    first, again = steps[begun : begun + 6], steps[begun + 6 :]
    assert len(again) == 4
    for before, after in zip(first[2:4], again[:2], strict=True):
        assert np.array_equal(before.codes_hw, after.codes_hw)
    branch = [*steps[: begun + 2], *again]
    codes, frames = served.played_anew([step.slots_rA for step in branch])
    assert np.array_equal(codes[-1], again[-1].codes_hw)
    assert np.array_equal(played.pixels(), frames[-1])
    assert any(
        not np.array_equal(before.codes_hw, after.codes_hw)
        for before, after in zip(first[4:], again[2:], strict=True)
    )


def test_a_key_pressed_in_the_past_waits_for_a_step_and_takes_no_future_away(
    steer_world, serve, visit
):
    served = serve(steer_world)
    played = visit(served.url)
    played.press("ArrowLeft", until=ends_with(served, *4 * ["LEFT"]))
    end = played.pause()
    page = played.page
    page.focus("#rewind")
    page.keyboard.press("Home")
    page.wait_for_selector(f"text=Frame 0 of {end}")
    page.keyboard.press("Escape")
    page.keyboard.down("ArrowRight")
    page.wait_for_timeout(300)
    page.keyboard.up("ArrowRight")
    assert page.inner_text("#position") == f"0 / {end}"
    assert played.position == 0


def test_a_step_after_going_back_quickly_is_one_from_where_one_wanted_to_be(
    steer_world, serve, visit
):
    served = serve(steer_world)
    played = visit(served.url)
    played.press("ArrowLeft", until=ends_with(served, *6 * ["LEFT"]))
    end = played.pause()
    page, done = played.page, served.done()
    page.keyboard.down("ArrowRight")
    page.evaluate("for (let k = 0; k < 4; k += 1) goTo(state.position - 1); stepOnce()")
    page.wait_for_selector(f"text={end - 3} / {end - 3}")
    assert served.done() == [*done, "RIGHT"]


def test_starting_over_returns_to_the_first_frame(steer_world, serve, visit):
    served = serve(steer_world)
    played = visit(served.url)
    played.press("ArrowLeft", until=ends_with(served, *4 * ["LEFT"]))
    played.pause()
    first = played.picture("/start/0.png")
    assert not np.array_equal(played.pixels(), first)
    played.page.keyboard.press("r")
    played.page.wait_for_selector("#begin:visible")
    played.until(lambda: np.array_equal(played.pixels(), first))  # words come before frames
    assert served.past()[1] == []


def test_let_it_play_presses_what_the_action_head_says_until_a_key_takes_over(
    steer_world, serve, visit
):
    served = serve(steer_world)
    played = visit(served.url)
    played.page.click("#autoplay")
    played.until(lambda: len(set(served.done())) > 1)
    played.page.wait_for_selector("#autoplay[aria-pressed=true]")
    played.page.keyboard.down("ArrowRight")
    played.page.wait_for_selector("#autoplay[aria-pressed=false]")
    played.until(ends_with(served, *12 * ["RIGHT"]))
