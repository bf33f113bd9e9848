"""Toy worlds that are played, and the browser that plays them."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pipelines.play.browser import (
    KEYS,
    STEER,
    Played,
    Served,
    launch_chromium,
    not_tested,
    serving,
    write_world,
)
from worldloom.common import ActionSpec


@pytest.fixture(scope="session")
def steer_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of four choices, one at a time."""
    return write_world(tmp_path_factory.mktemp("steer") / "world", STEER)


@pytest.fixture(scope="session")
def keys_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of five keys, two of them at once."""
    return write_world(tmp_path_factory.mktemp("keys") / "world", KEYS)


@pytest.fixture(scope="session")
def still_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world in which nobody does anything."""
    return write_world(tmp_path_factory.mktemp("still") / "world", ActionSpec.none())


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A Chromium, started once."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        not_tested(f"{error}; pip install playwright")
    with sync_playwright() as playwright:
        browser = launch_chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serve worlds until the test ends."""
    with ExitStack() as stack:
        yield lambda world, **settings: stack.enter_context(
            serving(world, tmp_path / f"sessions-{os.urandom(4).hex()}", **settings)
        )


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Played]]:
    """Open an address in a browser of its own; at the end nothing may have gone wrong in it."""
    visits: list[Played] = []
    with ExitStack() as stack:

        def open_page(url: str, *, wait: bool = True, **options: Any) -> Played:
            context = chromium.new_context(base_url=url.partition("?")[0], **options)
            stack.callback(context.close)
            context.set_default_timeout(20_000)
            played = Played(context.new_page())
            played.watch()
            visits.append(played)
            if wait:
                played.open(url)
            else:
                played.page.goto(url)
            return played

        yield open_page
    assert [error for played in visits for error in played.errors] == []
