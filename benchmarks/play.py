"""What play costs beyond the model: from a key to the painted frame, in a real Chromium, here.

    python benchmarks/play.py --world runs/demo --json play.json

Starts `worldloom play` as a process of its own, opens its page in a headless Chromium and presses
real keys. Three tables:

    key to frame       milliseconds from a key that goes down to the frame that it leads to.
                       `painted`: the browser has put it on its screen; `drawn`: it is on the
                       canvas, ready for that. The rows: one step of a world that stands still, in a
                       browser that paints at once, so that what is left is ours; the same in one
                       that waits for its screen, 60 times a second; and there a key that changes in
                       a world that goes as fast as it can. `beyond the model` is without the time
                       that the model took for that step and, in the last row, for what was left of
                       the step under way
    frames a second    of a world that goes as fast as it can, and what the model alone would give
    memory             of the server (resident) and of the page (JavaScript's heap, collected), over
                       --minutes of play as fast as it can. Going back in time is exact because the
                       server keeps states, up to 256 MiB of them: it grows by those, and then not

Without --world a world of the demo's size with random weights is played: every part costs the same,
the decoder only needs other numbers of forwards. Server, browser and model share the machine's
cores. Tables go to stdout, progress to stderr.
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from report import Report, arguments
from worldloom.common import ActionSpec, EpisodesSpec, EpisodeWriter, say
from worldloom.dynamics import DynamicsConfig, DynamicsModel, DynamicsSpec
from worldloom.tokenizer import ConvTokenizer, QuantizerConfig, TokenizerConfig, Trained

FPS = 8.75
_AT_ONCE = ("--disable-frame-rate-limit", "--disable-gpu-vsync")

# Watches the page from outside: when keys went down, when a frame's header came, when it was drawn
# on the canvas, and when the browser had painted it: the first task after the next animation frame.
WATCH = """
  window.watched = { keys: [], frames: [], most: 4000 };
  addEventListener("keydown", (event) => watched.keys.push(event.timeStamp), true);
  const frames = watched.frames;
  const Plain = WebSocket;
  window.WebSocket = class extends Plain {
    constructor(...words) {
      super(...words);
      this.addEventListener("message", ({ data }) => {
        if (typeof data === "string") return;
        const length = new DataView(data).getUint32(0, true);
        const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
        frames.push({ ...header, came: performance.now() });
        if (frames.length > watched.most) frames.splice(0, frames.length / 2);
      });
    }
  };
  const draw = CanvasRenderingContext2D.prototype.drawImage;
  CanvasRenderingContext2D.prototype.drawImage = function (...words) {
    draw.apply(this, words);
    if (this.canvas.id !== "canvas") return;
    const drawn = performance.now();
    const waiting = frames.filter((frame) => frame.drawn === undefined);
    for (const frame of waiting) frame.drawn = drawn;
    requestAnimationFrame(() => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => waiting.forEach((frame) => (frame.painted = performance.now()));
      port2.postMessage(0);
    });
  };
"""


def random_world(folder: Path) -> Path:
    """Write a world of the demo's size with random weights; return its folder."""
    actions = ActionSpec.discrete(["NOOP", "ATTACK", "MOVE_RIGHT", "MOVE_LEFT"])
    spec = EpisodesSpec(
        actions=actions, height=64, width=64, fps=FPS, frame_skip=4, source={"env": "random"}
    )
    episodes = folder / "episodes"
    episodes.mkdir(parents=True)
    spec.write(episodes)
    rng = np.random.default_rng(0)
    with EpisodeWriter(episodes, "episode-000000", spec=spec) as writer:
        for frame in rng.integers(0, 256, (64, 8, 8, 3), np.uint8):
            writer.append(frame.repeat(8, axis=0).repeat(8, axis=1))
        writer.finish(rng.integers(0, 4, 63))
    tokenizer = ConvTokenizer(
        TokenizerConfig(
            height=64,
            width=64,
            patch=4,
            widths=(64, 128, 192),
            num_blocks=(1, 2, 2),
            temporal_kernel=3,
            quantizer=QuantizerConfig(kind="fsq", fsq_levels=(8, 8, 4, 4)),
        ),
        trained=Trained(fps=FPS, frame_skip=4),
        seed=0,
    ).eval()
    tokenizer.save(folder / "tokenizer" / "model", card="random")
    DynamicsModel(
        DynamicsConfig(num_layers=4, dim=192, num_heads=6, context_frames=8, num_meta_tokens=16),
        DynamicsSpec(tokenizer=tokenizer.spec, actions=actions, fps=FPS, frame_skip=4),
        tokenizer.codebook.numpy(),
        seed=0,
    ).eval().save(folder / "dynamics" / "model", card="random")
    return folder


@contextmanager
def served(world: Path, sessions: Path) -> Iterator[tuple[str, int]]:
    """Play a world in a process of its own; yield (address, process id)."""
    command = [sys.executable, "-m", "worldloom.pipelines", "play", str(world)]
    server = subprocess.Popen(
        [*command, "--port", "0", "--sessions", str(sessions)], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    address = None
    for line in server.stderr:
        sys.stderr.write(line)
        if found := re.search(r"http://\S+token=\S+", line):
            address = found.group()
            break
    if address is None:
        raise SystemExit(f"play: the server ended with {server.wait()} before it gave an address")
    threading.Thread(target=server.stderr.read, daemon=True).start()  # or its pipe fills
    try:
        yield address, server.pid
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


@contextmanager
def chromium(*, at_once: bool) -> Iterator[Any]:
    """Start a Chromium: the system's, or playwright's own; with a display that never waits."""
    from playwright.sync_api import Error, sync_playwright

    flags = ["--no-sandbox", *(_AT_ONCE if at_once else [])]
    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        for path in [*filter(None, map(shutil.which, names)), None]:
            try:
                browser = playwright.chromium.launch(executable_path=path, args=flags)
            except Error as error:
                say(f"{path or 'playwright'}: {error.message[:200]}")
                continue
            yield browser
            browser.close()
            return
    raise SystemExit("play: no Chromium could be started; install one, then run this again")


def open_page(browser: Any, address: str) -> Any:
    """Open the page, watched; return it when the first frame is there."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.add_init_script(WATCH)
    page.goto(address)
    page.wait_for_selector("#position:not(:empty)", timeout=60_000)
    return page


def stand_still(page: Any, count: int, warm: int) -> list[dict[str, float]]:
    """Step a world that stands still, key by key."""
    found = []
    for number in range(warm + count):
        page.evaluate("watched.keys.length = watched.frames.length = 0")
        page.keyboard.press("Period")
        frame = _wait(page, "watched.frames.find((frame) => frame.painted)")
        pressed = page.evaluate("watched.keys[0]")
        if number >= warm:
            found.append(_times(frame, pressed, under_way_ms=0.0))
    return found


def keep_going(page: Any, count: int, warm: int, seed: int) -> list[dict[str, float]]:
    """Press and release a key at random times while the world goes as fast as it can."""
    rng, found = random.Random(seed), []
    key = page.evaluate("world.controls.find(({ keys }) => keys.length).keys[0]")
    _set_running(page, "true")
    for number in range(warm + count):
        page.wait_for_timeout(rng.uniform(80, 240))
        page.evaluate("watched.keys.length = 0")
        before = page.evaluate("inputNumber")
        page.keyboard.down(key)
        frame = _wait(page, f"watched.frames.find((frame) => frame.n > {before} && frame.painted)")
        pressed = page.evaluate("watched.keys[0]")
        page.keyboard.up(key)
        # The step that was under way when the key came ended, as far as the page can tell, with
        # the last frame of the input before.
        last = page.evaluate(
            f"watched.frames.filter((frame) => frame.n <= {before}).at(-1)?.came ?? 0"
        )
        if number >= warm:
            found.append(_times(frame, pressed, under_way_ms=max(0.0, last - pressed)))
    _set_running(page, "false")
    return found


def _wait(page: Any, expression: str) -> dict[str, float]:
    """Return what the page comes to have, asking it now and then."""
    deadline = time.monotonic() + 60
    while (value := page.evaluate(expression)) is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"play: the page never had {expression}")
        page.wait_for_timeout(5)
    return dict(value)


def _set_running(page: Any, on: str) -> None:
    page.evaluate("send({ type: 'pace', frames_per_s: 0 })")
    page.evaluate(f"run({on})")
    page.wait_for_selector(f"#run[aria-label={'Pause' if on == 'true' else 'Play'}]")


def _times(frame: dict[str, float], pressed: float, *, under_way_ms: float) -> dict[str, float]:
    model = frame["model_ms"]
    return {
        "model": model,
        "drawn": frame["drawn"] - pressed,
        "painted": frame["painted"] - pressed,
        "drawn beyond": frame["drawn"] - pressed - model - under_way_ms,
        "painted beyond": frame["painted"] - pressed - model - under_way_ms,
    }


def latency_row(name: str, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return a row of the first table."""

    def at(column: str, percent: float) -> float:
        return float(np.percentile([one[column] for one in found], percent))

    return {
        "what": name,
        "keys": len(found),
        "model ms": at("model", 50),
        "painted p50": at("painted", 50),
        "painted p95": at("painted", 95),
        "drawn beyond the model p50": at("drawn beyond", 50),
        "drawn beyond the model p95": at("drawn beyond", 95),
        "painted beyond the model p50": at("painted beyond", 50),
        "painted beyond the model p95": at("painted beyond", 95),
    }


def speed_row(page: Any, seconds: float) -> dict[str, Any]:
    """Play as fast as it can for some seconds."""
    _set_running(page, "true")
    page.wait_for_timeout(1000)
    look = "({ at: performance.now(), position: shown.position })"
    page.evaluate("watched.frames.length = 0")
    before = page.evaluate(look)
    page.wait_for_timeout(1000 * seconds)
    after = page.evaluate(look)
    frames = page.evaluate("watched.frames.map(({ model_ms, drawn }) => [model_ms, drawn])")
    model_ms = float(np.median([milliseconds for milliseconds, _ in frames]))
    drawn = len({moment for _, moment in frames if moment is not None})
    _set_running(page, "false")
    elapsed_s = (after["at"] - before["at"]) / 1000
    return {
        "seconds": elapsed_s,
        "frames/s played": (after["position"] - before["position"]) / elapsed_s,
        "frames/s painted": drawn / elapsed_s,
        "model ms": model_ms,
        "frames/s of the model alone": 1000 / model_ms,
    }


def memory_rows(page: Any, process: int, minutes: float, rows: int) -> list[dict[str, Any]]:
    """Play as fast as it can, and look at the memory now and then."""
    tools = page.context.new_cdp_session(page)
    tools.send("HeapProfiler.enable")
    page.evaluate("watched.most = 100")  # or the watch is what grows
    _set_running(page, "true")
    found = []
    began = time.monotonic()
    for number in range(rows + 1):
        due = began + 60 * minutes * number / rows
        while time.monotonic() < due:
            page.wait_for_timeout(min(1000, max(1, 1000 * (due - time.monotonic()))))
        tools.send("HeapProfiler.collectGarbage")
        heap = tools.send("Runtime.getHeapUsage")["usedSize"]
        found.append(
            {
                "minutes": (time.monotonic() - began) / 60,
                "frames": page.evaluate("shown.position"),
                "server MiB": resident_bytes(process) / 2**20,
                "page MiB": heap / 2**20,
            }
        )
        say(f"{found[-1]['frames']} frames, server {found[-1]['server MiB']:.0f} MiB")
    _set_running(page, "false")
    return found


def resident_bytes(process: int) -> int:
    """Return how much memory a process holds."""
    status = Path(f"/proc/{process}/status")
    if status.exists():
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read_text()).group(1))
    found = subprocess.check_output(["ps", "-o", "rss=", "-p", str(process)], text=True)
    return 1024 * int(found)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--world", type=Path, help="folder that worldloom demo wrote")
    parser.add_argument("--minutes", type=float, default=2.0, help="of play, for the memory")
    parser.add_argument("--keys", type=int, default=200, help="presses of every kind")
    parser.add_argument("--seconds", type=float, default=20.0, help="of play, for the speed")
    parser.add_argument("--seed", type=int, default=0, help="of when keys are pressed")
    words = parser.parse_args()
    keys, seconds, minutes, rows = words.keys, words.seconds, words.minutes, 8
    if words.quick:
        keys, seconds, minutes, rows = 8, 1.0, 0.03, 2
    report = Report("play", quick=words.quick, packages=("starlette", "uvicorn", "playwright"))
    folder = Path(tempfile.mkdtemp(prefix="worldloom-"))
    try:
        world = words.world or random_world(folder / "random")
        settings = {
            "world": words.world.name if words.world else "random weights",
            "seed": words.seed,
        }
        warm = min(20, keys)
        with served(world, folder / "sessions") as (address, process):
            say("key to frame")
            with chromium(at_once=True) as browser:
                page = open_page(browser, address)
                found = {"a step, standing still, painted at once": stand_still(page, keys, warm)}
            with chromium(at_once=False) as browser:
                settings["browser"] = f"Chromium {browser.version}"
                page = open_page(browser, address)
                found["a step, standing still"] = stand_still(page, keys, warm)
                found["as fast as it can"] = keep_going(page, keys, warm, words.seed)
                latencies = [latency_row(name, times) for name, times in found.items()]
                report.table("key to frame (ms)", latencies, settings=settings)
                say("frames a second")
                report.table("frames a second", [speed_row(page, seconds)], settings=settings)
                say("memory")
                memory = memory_rows(page, process, minutes, rows)
                report.table("memory", memory, settings=settings)
        report.write(words.json)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
