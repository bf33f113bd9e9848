"""The page in a real Chromium: for whoever uses the keyboard alone, a screen reader, any screen."""

import pytest

LIGHT_PAPER, DARK_PAPER = "rgb(252, 251, 249)", "rgb(19, 21, 25)"
NARROW = {"width": 360, "height": 740}

FOCUSED = """() => {
  const element = document.activeElement;
  const { outlineStyle } = getComputedStyle(element);
  const around = getComputedStyle(element.closest("label") ?? element);
  const name = element.id || element.getAttribute("aria-label") || element.textContent.trim();
  return {
    id: element === document.body ? "" : name,
    ring: [outlineStyle, around.outlineStyle].some((style) => style !== "none"),
  };
}"""


def test_every_control_is_reached_by_tab_and_shows_that_it_has_the_focus(steer_world, serve, visit):
    page = visit(serve(steer_world).url).page
    page.focus("#stage")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        if reached and focused["id"] == reached[0]["id"]:
            break
        reached.append(focused)
    ids = {focused["id"] for focused in reached}
    assert {"begin", "run", "step", "reset", "record", "full", "upload", "seed", "dice"} <= ids
    assert {"autoplay", "setting-temperature", "setting-min_p", "setting-decoder"} <= ids
    assert {"help-open", "stage"} <= ids
    assert sum(", key " in name for name in ids) == 3  # the world's own
    assert sum(name.startswith("Start from ") for name in ids) == 3
    assert [one["id"] for one in reached if not one["ring"] and one["id"]] == []


def test_a_world_is_played_with_the_keyboard_alone(steer_world, serve, visit):
    served = serve(steer_world)
    played = visit(served.url)
    page = played.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "begin"
    page.keyboard.press("Enter")
    played.wait_for_position(2)
    assert page.evaluate("document.activeElement.id") == "stage"
    page.keyboard.press("p")
    page.wait_for_selector("#run[aria-label=Play]")
    end = played.settle()
    page.keyboard.press("Comma")
    page.wait_for_selector(f"text=Frame {end - 1} of {end}")
    page.focus(".key[data-name=LEFT]")
    page.keyboard.down("Enter")
    assert page.locator(".key.held").count() == 1
    page.keyboard.press("Period")
    played.until(lambda: served.done()[-1:] == ["LEFT"])
    page.keyboard.up("Enter")
    assert page.locator(".key.held").count() == 0
    page.focus("#rewind")
    page.keyboard.press("Home")  # the slider's own keys stay the slider's
    played.until(lambda: page.inner_text("#position").startswith("0 /"))
    page.focus("#setting-temperature")
    before = page.input_value("#setting-temperature")
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#setting-temperature") != before
    assert page.locator(".key.held").count() == 0
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "stage"
    page.keyboard.press("/")
    page.wait_for_selector("#help:visible")
    help_text = page.inner_text("#help")
    for words in ("Left", "Play or pause", "One frame back", "Start over"):
        assert words in help_text
    page.keyboard.press("ArrowLeft")
    assert page.locator(".key.held").count() == 0
    page.keyboard.press("Escape")
    page.wait_for_selector("#help", state="hidden")


def test_the_seed_is_changed_step_by_step_without_leaving_its_field(steer_world, serve, visit):
    played = visit(serve(steer_world, seed=4).url)
    page = played.page
    page.focus("#seed")
    for seed in ("5", "6"):
        page.keyboard.press("ArrowUp")
        assert page.input_value("#seed") == seed
        assert page.evaluate("document.activeElement.id") == "seed"
    page.wait_for_timeout(300)
    assert page.locator(".key.held").count() == 0
    assert page.inner_text("#position") == "0 / 0"
    page.keyboard.press("Enter")
    played.until(lambda: page.evaluate("document.activeElement.id") == "stage")


def test_notices_are_seen_in_full_screen_and_so_are_the_keys(steer_world, serve, visit):
    played = visit(serve(steer_world).url)
    page = played.page
    page.click("#full")
    is_inside = "(inside) => !!document.fullscreenElement?.contains(document.querySelector(inside))"
    for inside in ("#notices", ".key", "#stage"):
        played.until(lambda inside=inside: page.evaluate(is_inside, inside))
    page.evaluate("document.exitFullscreen()")
    # The element is null a moment before the page hears of it and moves them back.
    outside = "document.getElementById('notices').parentElement === document.body"
    played.until(lambda: page.evaluate(outside))
    assert page.evaluate("document.fullscreenElement") is None


def test_everything_has_a_name_and_the_live_region_does_not_chatter(steer_world, serve, visit):
    served = serve(steer_world)
    played = visit(served.url)
    page = played.page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll(
             "button, input, select, canvas, [role]")].filter((element) => {
             if (element.closest("[hidden], [aria-hidden=true]")) return false;
             const labels = [...(element.labels ?? [])].map((label) => label.textContent).join("");
             const by = (element.getAttribute("aria-labelledby") ?? "").split(" ")
               .map((id) => document.getElementById(id)?.textContent ?? "").join("");
             const own = /^(BUTTON|SUMMARY)$/.test(element.tagName) ? element.textContent : "";
             const exempt = /^(status|alert)$/.test(element.getAttribute("role") ?? "");
             return !exempt
               && !(labels + by + own + (element.getAttribute("aria-label") ?? "")).trim();
           }).map((element) => element.outerHTML)"""
    )
    assert nameless == []
    tree = page.locator("body").aria_snapshot()
    for part in ('application "The world"', 'group "Keys of this world"', 'slider "Rewind"'):
        assert part in tree
    assert page.get_attribute("#live", "aria-live") == "polite"
    page.evaluate(
        """() => { window.said = []; new MutationObserver(() =>
             said.push(document.getElementById("live").textContent)
           ).observe(document.getElementById("live"), { childList: true }); }"""
    )
    played.press("ArrowLeft", until=lambda: len(served.done()) > 25)
    end = played.pause()
    page.wait_for_timeout(100)
    assert page.evaluate("said") == ["Playing.", f"Paused at frame {end}."]


def test_nothing_is_asked_of_anybody_else_and_no_script_but_ours_runs(steer_world, serve, visit):
    served = serve(steer_world)
    played = visit(served.url)
    played.press("ArrowLeft", until=lambda: len(served.done()) > 2)
    origin = served.url.partition("/?")[0]
    hosts = {address.partition("?")[0] for address in played.asked}
    assert all(host.startswith((origin, origin.replace("http", "ws"), "data:")) for host in hosts)
    assert not played.errors
    ran = played.page.evaluate(
        """() => {
          const inline = document.createElement("script");
          inline.textContent = "window.ran = true";
          document.body.append(inline);
          const handler = document.createElement("button");
          handler.setAttribute("onclick", "window.ran = true");
          document.body.append(handler);
          handler.click();
          return window.ran === true;
        }"""
    )
    assert not ran
    # The console's lines come after the answer.
    policy = "Content Security Policy"
    played.until(lambda: sum(policy in error for error in played.errors) == 2)
    played.errors.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_system_is(steer_world, serve, visit, scheme):
    page = visit(serve(steer_world).url, color_scheme=scheme).page
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == (LIGHT_PAPER if scheme == "light" else DARK_PAPER)
    faint = page.evaluate(
        """() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map((value) => {
              const part = value / 255;
              return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const backed = (element) => {
            const colour = getComputedStyle(element).backgroundColor;
            if (!/, 0\\)$|transparent/.test(colour)) return colour;
            return element.parentElement ? backed(element.parentElement) : "rgb(255, 255, 255)";
          };
          const words = [...document.querySelectorAll(
            "h1, h2, p, dt, dd, label, output, kbd, .key span")];
          return words.filter((element) => {
            if (!element.checkVisibility() || !element.textContent.trim()) return false;
            if (element.closest(".off, :disabled, .unseen, #stage")) return false;
            const pair = [getComputedStyle(element).color, backed(element)].map(light).sort();
            return (pair[1] + 0.05) / (pair[0] + 0.05) < 4.5;
          }).map((element) => element.outerHTML);
        }"""
    )
    assert faint == []


@pytest.mark.parametrize(
    "screen",
    [
        {"viewport": NARROW, "device_scale_factor": 3, "has_touch": True, "is_mobile": True},
        {"viewport": {"width": 1024, "height": 640}},
        {"viewport": {"width": 1920, "height": 1080}, "device_scale_factor": 1.25},
    ],
    ids=["phone", "laptop", "scaled"],
)
def test_on_every_screen_a_pixel_is_a_square_of_whole_pixels_and_nothing_sticks_out(
    steer_world, serve, visit, screen
):
    page = visit(serve(steer_world).url, **screen).page
    page.wait_for_selector("#canvas.crisp")
    box, ratio = page.locator("#canvas").bounding_box(), screen.get("device_scale_factor", 1)
    scale = box["width"] * ratio / 16
    assert scale == pytest.approx(round(scale), abs=0.01)
    assert box["height"] == pytest.approx(box["width"])
    assert page.evaluate("getComputedStyle(canvas).imageRendering") == "pixelated"
    # As large as the stage takes.
    stage = page.locator("#views").bounding_box()
    assert max(box["width"] / stage["width"], box["height"] / stage["height"]) > 0.85
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for name in ("#run", ".key[data-name=LEFT]", "#position"):
        part = page.locator(name).bounding_box()
        assert part["x"] >= 0
        assert part["x"] + part["width"] <= screen["viewport"]["width"]
        assert part["y"] + part["height"] <= screen["viewport"]["height"]  # without scrolling


def test_who_asked_for_less_motion_gets_no_transitions_and_no_glow(steer_world, serve, visit):
    page = visit(serve(steer_world).url, reduced_motion="reduce").page
    assert page.locator("#glow").is_hidden()
    assert (
        page.evaluate("getComputedStyle(document.getElementById('run')).transitionDuration") == "0s"
    )
    page = visit(serve(steer_world).url).page
    assert page.locator("#glow").is_visible()
