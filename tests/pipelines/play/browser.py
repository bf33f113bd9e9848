"""A real browser in front of a real world: toy worlds on disk, a server for them, Chromium.

actions      -> write_world -> a folder laid out as `worldloom demo` does it
that folder  -> serving     -> Served: an address, and the log of what was played
an address   -> Played      -> what a person sees and does there
"""

import asyncio
import base64
import io
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
import torch
from chain_worlds import save_tokenizer
from PIL import Image
from worldloom.common import ActionSpec, EpisodesSpec, EpisodeWriter
from worldloom.dynamics import DynamicsConfig, DynamicsModel, DynamicsSpec, SamplingConfig
from worldloom.pipelines.play.command import PlayConfig, open_player, open_session
from worldloom.pipelines.play.session_log import RecordedSession, Reset, Step
from worldloom.pipelines.play.worlds import world_files
from worldloom.pipelines.world import World
from worldloom.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

STEER = ActionSpec.discrete(["STAY", "LEFT", "RIGHT", "FIRE"])
KEYS = ActionSpec.keys(["up", "down", "left", "right", "fire"], max_keys=2)
FPS = 20.0
TOKEN = "token-of-the-tests"
SAMPLING = SamplingConfig(temperature=1.0, min_p=0.0)
PAINTED = "!painting && !newest && shown !== null && shown.position === state.position"
"""Whether the canvas shows what the page says: words of a position come before its frame."""


def write_world(folder: Path, actions: ActionSpec, /) -> Path:
    """Write a world of random weights that listens to its actions; return its folder."""
    episodes, model_folder = folder / "episodes", folder / "dynamics" / "model"
    spec = EpisodesSpec(
        actions=actions, height=16, width=16, fps=FPS, frame_skip=1, source={"env": "toy"}
    )
    episodes.mkdir(parents=True)
    spec.write(episodes)
    rng = np.random.default_rng(0)
    for number in range(6):
        with EpisodeWriter(episodes, f"episode-{number:06d}", spec=spec) as writer:
            for frame in rng.integers(0, 256, (40, 4, 4, 3), np.uint8):
                writer.append(frame.repeat(4, axis=0).repeat(4, axis=1))
            slots_TA = rng.integers(0, np.array(actions.sizes, int), (39, actions.num_slots))
            if actions.kind == "keys":
                slots_TA[:] = 0  # rising numbers only are keys
            writer.finish(actions.decode(slots_TA))
    save_tokenizer(folder / "tokenizer" / "model")
    tokenizer = load_tokenizer(str(folder / "tokenizer" / "model"))
    model = DynamicsModel(
        DynamicsConfig(
            num_layers=1,
            dim=32,
            num_heads=2,
            context_frames=6,
            num_meta_tokens=2,
            action_head=actions.num_slots > 0,
        ),
        DynamicsSpec(tokenizer=tokenizer.spec, actions=actions, fps=FPS, frame_skip=1),
        tokenizer.codebook.numpy(),
        seed=1,
    ).eval()
    with torch.no_grad():  # fresh weights hardly listen; these do, at random
        if actions.num_slots:
            model.actions.table.weight.mul_(50)
        model.head.to_logits.weight.mul_(20)
        model.cell.weight.mul_(25)
    model.save(model_folder, card="toy")
    return folder


@dataclass
class Served:
    """A world that is being served."""

    url: str
    world: Path
    log: Path
    server: Any
    loop: asyncio.AbstractEventLoop

    def cut(self) -> None:
        """Break every connection from the server's side, without a word."""

        def abort() -> None:
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        self.loop.call_soon_threadsafe(abort)

    def past(self) -> tuple[Reset, list[Step]]:
        """Return the last start, and the steps since as the log has them."""
        events = [event for _, event in RecordedSession(self.log).events()]
        starts = [index for index, event in enumerate(events) if isinstance(event, Reset)]
        start = events[starts[-1]]
        assert isinstance(start, Reset)
        return start, [event for event in events[starts[-1] :] if isinstance(event, Step)]

    def done(self) -> list[str]:
        """Return what was done at each of them, in words."""
        actions = RecordedSession(self.log).actions
        return [actions.describe(step.slots_rA)[0] for step in self.past()[1]]

    def played_anew(self, slots: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return (codes, frames) of a world of its own that does these steps from the last start.

        It shares nothing with the server but the files.
        """
        start, _ = self.past()
        files = world_files(self.world)
        world = World.from_pretrained(files.model, files.tokenizer, sampling=start.sampling)
        world.reset(torch.from_numpy(start.codes_thw), start.slots_TA, seed=start.seed)
        results = [world.step(slots_rA) for slots_rA in slots]
        return [codes_hw.numpy() for _, codes_hw in results], [f_THWC[-1] for f_THWC, _ in results]


@contextmanager
def serving(
    world: Path, sessions: Path, /, *, port: int = 0, token: str = TOKEN, **settings: Any
) -> Iterator[Served]:
    """Serve a world as `worldloom play` does it, in a thread."""
    from worldloom.pipelines.play.server import address_of, build_app, listen, make_server

    config = PlayConfig(
        world=world, sessions=sessions, device="cpu", **{"sampling": SAMPLING, **settings}
    )
    files = world_files(world)
    with closing(listen("127.0.0.1", port)) as listener:
        session, log = open_session(files, config)
        player = open_player(session, files, pace=config.pace, recordings=log.folder)
        server = make_server(build_app(player, token=token, host="127.0.0.1"))
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

        player.start()
        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server ended before it began"
                thread.join(0.01)
            url = address_of(listener, "127.0.0.1", token)
            yield Served(url, world, log.folder, server, loops[0])
        finally:
            server.should_exit = True
            thread.join(10)
            assert player.stop(timeout_s=10)


def launch_chromium(playwright: "Playwright", /) -> "Browser":
    """Start a Chromium: the system's, or playwright's own; skip loudly where there is none."""
    from playwright.sync_api import Error

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    paths = [path for name in names if (path := shutil.which(name))]
    said = []
    for path in [*paths, None]:
        try:
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            said.append(f"{path or 'playwright install chromium'}: {error.message[:200]}")
    not_tested("no Chromium could be started: " + "; ".join(said))


def not_tested(why: str) -> NoReturn:
    """Skip, so that nobody overlooks it."""
    reason = f"THE PLAY PAGE WAS NOT TESTED: {why}"
    warnings.warn(reason, stacklevel=1)
    pytest.skip(reason)


@dataclass
class Played:
    """The page, in a person's hands."""

    page: "Page"
    errors: list[str] = field(default_factory=list)
    """What the console and uncaught errors said."""
    asked: list[str] = field(default_factory=list)
    """Every address that was asked for."""

    def watch(self) -> None:
        """Take note of errors and requests from now on."""
        page = self.page
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda line: line.type in ("error", "warning") and self.errors.append(line.text),
        )
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("websocket", lambda socket: self.asked.append(socket.url))

    def open(self, url: str) -> None:
        """Open the page, and wait for the first frame."""
        self.page.goto(url)
        self.page.wait_for_selector("#link[data-state=open]")
        self.page.wait_for_selector("#position:not(:empty)")
        # What the canvas holds is then the frame to the last bit.
        self.page.evaluate("send({type: 'format', image: 'png'})")

    @property
    def position(self) -> int:
        """Where the page says that it is."""
        return int(self.page.locator("#position").inner_text().split(" / ")[0])

    def until(self, so: Callable[[], bool]) -> None:
        """Wait until something is so; the page goes on meanwhile.

        Not by `page.wait_for_function`: an expression that is not true at once is looked at again
        by eval, which our page refuses.
        """
        deadline = time.monotonic() + 30
        while not so():
            assert time.monotonic() < deadline, f"not so after 30 s, at position {self.position}"
            self.page.wait_for_timeout(10)

    def wait_for_position(self, position: int) -> None:
        """Wait until it is that far."""
        self.until(lambda: self.position >= position)

    def press(self, key: str, *, until: Callable[[], bool]) -> None:
        """Hold a key until something is so."""
        self.page.keyboard.down(key)
        self.until(until)
        self.page.keyboard.up(key)

    def pause(self) -> int:
        """Pause; return the position at which it stands."""
        self.page.locator("#run[aria-label=Pause]").click()
        self.page.wait_for_selector("#run[aria-label=Play]")
        return self.settle()

    def settle(self) -> int:
        """Wait until nothing moves any more, and the canvas shows it; return the position."""

        def stands() -> bool:
            painted, before = self.page.evaluate(PAINTED), self.position
            self.page.wait_for_timeout(150)
            return painted and self.page.evaluate(PAINTED) and self.position == before

        self.until(stands)
        return self.position

    def pixels(self, canvas: str = "#canvas") -> np.ndarray:
        """Return what is on a canvas, frame_HWC."""
        data = self.page.evaluate(
            "(name) => document.querySelector(name).toDataURL('image/png')", canvas
        )

        return _opened(base64.b64decode(data.partition(",")[2]))

    def picture(self, path: str) -> np.ndarray:
        """Return a picture that the server has, frame_HWC."""
        return _opened(self.page.request.get(f"{path}?token={TOKEN}").body())


def _opened(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))
