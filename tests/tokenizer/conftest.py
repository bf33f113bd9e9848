"""What the tokenizer's tests share: toys, on one thread."""

from collections.abc import Iterator

import pytest
import torch
from tokenizer.toys import make_tokenizer, write_toy_episodes
from worldloom.common import Episodes
from worldloom.tokenizer import ConvTokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> ConvTokenizer:
    """A tiny tokenizer in which every layer does something; do not change it."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def toy_episodes(tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    """Six episodes of a bouncing square; episode-5 is the held-out one. Do not change them."""
    return write_toy_episodes(tmp_path_factory.mktemp("toys") / "episodes")
