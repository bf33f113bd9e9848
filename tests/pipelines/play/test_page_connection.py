"""The page in a real Chromium when its server goes, comes back, or is somebody else's."""

import numpy as np
from pipelines.play.browser import serving


def expected(errors: list[str]) -> None:
    """Take away what a browser itself says of a connection that it could not make."""
    errors[:] = [
        error
        for error in errors
        if "ERR_CONNECTION" not in error and "WebSocket connection" not in error
        if "status of 403" not in error
    ]


def test_a_connection_that_breaks_comes_back_where_it_was_with_a_notice(steer_world, serve, visit):
    served = serve(steer_world)
    played = visit(served.url)
    said = []
    played.page.expose_function("heard", lambda text: said.append(text))
    played.page.evaluate(
        """() => new MutationObserver((changes) => {
             for (const { addedNodes } of changes) for (const node of addedNodes)
               heard(`${node.getAttribute("role")}: ${node.firstChild.textContent}`);
           }).observe(document.getElementById("notices"), { childList: true })"""
    )
    played.page.keyboard.down("ArrowLeft")
    played.until(lambda: served.done()[-3:] == 3 * ["LEFT"])
    before = len(served.done())
    served.cut()
    played.until(lambda: len(said) >= 2)
    assert "connection is gone" in said[0]
    assert said[0].startswith("alert")
    assert said[-1] == "status: Connected again, where you were."
    assert played.page.inner_text("#link") == "Connected"
    assert played.page.locator(".key.held").count() == 0  # the key was let go, as nobody saw it
    played.page.keyboard.up("ArrowLeft")
    played.until(lambda: served.done()[-2:] == 2 * ["STAY"])
    assert len(served.done()) > before  # it is the same play, and goes on
    expected(played.errors)


def test_what_stood_still_stands_still_after_coming_back(steer_world, serve, visit):
    served = serve(steer_world)
    played = visit(served.url)
    played.press("ArrowLeft", until=lambda: served.done()[-3:] == 3 * ["LEFT"])
    end = played.pause()
    picture = played.pixels()
    served.cut()
    played.page.wait_for_selector("#notice-back")
    assert played.settle() == end
    assert np.array_equal(played.pixels(), picture)
    played.page.keyboard.press("Period")
    played.wait_for_position(end + 1)
    expected(played.errors)


def test_a_server_that_is_gone_is_said_and_one_that_comes_back_is_found(
    steer_world, tmp_path, visit
):
    with serving(steer_world, tmp_path / "first") as served:
        played = visit(served.url)
        port = int(served.url.split(":")[2].split("/")[0])
    notice = played.page.locator("#notice-link")
    notice.filter(has_text="still running?").wait_for()
    assert played.page.locator("#stage.away").count() == 1
    with serving(steer_world, tmp_path / "second", port=port) as served:
        played.page.wait_for_selector("#notice-back:has-text('starts over')")
        played.page.keyboard.press("Period")
        played.wait_for_position(1)
        assert len(served.done()) == 1
        played.page.close()  # it would go on trying, and complain
    expected(played.errors)


def test_a_server_that_was_started_again_says_that_its_address_is_another(
    steer_world, tmp_path, visit
):
    with serving(steer_world, tmp_path / "first") as served:
        played = visit(served.url)
        port = int(served.url.split(":")[2].split("/")[0])
    with serving(steer_world, tmp_path / "second", port=port, token="another"):
        played.page.locator("#notice-link").filter(has_text="new token").wait_for()
        played.page.close()  # it would go on trying, and complain
    expected(played.errors)


def test_a_second_player_is_told_that_the_world_is_busy_and_gets_it_when_it_is_free(
    steer_world, serve, visit
):
    served = serve(steer_world)
    first = visit(served.url)
    second = visit(served.url, wait=False)
    notice = second.page.locator("#notice-link")
    notice.wait_for()
    assert "Trying again" in notice.inner_text()
    assert second.page.inner_text("#link") == "Busy"
    # It would try again by itself, and take the button away before it is pressed.
    second.until(lambda: second.page.evaluate("socket === null"))
    second.page.evaluate("clearTimeout(retry)")
    first.page.keyboard.press("Period")
    first.wait_for_position(1)  # undisturbed
    first.page.close()
    second.page.locator("#notice-link button").click()
    second.page.wait_for_selector("#link[data-state=open]")
    second.until(lambda: second.page.inner_text("#position") == "0 / 0")
    assert not notice.is_visible()


def test_the_same_player_in_a_second_tab_takes_over_and_the_first_does_not_fight_back(
    steer_world, serve, visit
):
    served = serve(steer_world)
    first = visit(served.url)
    first.page.keyboard.press("Period")
    first.wait_for_position(1)
    client = first.page.evaluate("sessionStorage.getItem('client')")
    second = visit(served.url, wait=False)
    second.page.evaluate("(id) => sessionStorage.setItem('client', id)", client)
    second.page.reload()  # as a duplicated tab does: it has the same storage
    second.page.wait_for_selector("#link[data-state=open]")
    second.until(lambda: second.page.inner_text("#position") == "1 / 1")
    taken = first.page.locator("#notice-link").filter(has_text="another tab")
    taken.wait_for()
    first.page.wait_for_timeout(1500)
    assert second.page.inner_text("#link") == "Connected"
    taken.get_by_role("button").click()
    first.page.wait_for_selector("#link[data-state=open]")
    second.page.locator("#notice-link").filter(has_text="another tab").wait_for()
