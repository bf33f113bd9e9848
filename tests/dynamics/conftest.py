"""What the dynamics' tests share: toys, on one thread."""

from collections.abc import Iterator

import pytest
import torch
from dynamics.toys import STEER, Mover
from worldloom.common import TokenShards


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toys too go through the products that are laid out for generating, as real models do.

    The pipelines' tests leave them alone.
    """
    monkeypatch.setattr("worldloom.dynamics.linear._PACKED_FROM", 1)


@pytest.fixture(scope="session")
def mover_shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Six walks of twelve frames; e5 is held out. Do not change them."""
    return Mover(STEER).write(tmp_path_factory.mktemp("toys") / "shards", episodes=6, num_frames=12)


@pytest.fixture(scope="session")
def walks(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Nine walks of nine frames in three shards; e8 is held out. Do not change them."""
    return Mover(STEER).write(tmp_path_factory.mktemp("walks") / "shards", episodes=9, num_frames=9)
