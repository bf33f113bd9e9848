"""What many tests share: the Hypothesis profile, tiny specs, episodes and shards, and a killer."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    EpisodesSpec,
    EpisodeWriter,
    ShardRecord,
    TokenEpisode,
    TokenizerSpec,
    write_manifest,
    write_shard,
)

settings.register_profile(
    "worldloom",
    deadline=None,
    derandomize=True,
    # Fixtures are folders and specs here; nothing in them changes between two inputs.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("worldloom")

# A shell that starts the tests in the background has them ignore Ctrl-C, and every command that a
# test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


ACTION_SPECS = {
    "none": ActionSpec.none(),
    "discrete": ActionSpec.discrete(["noop", "left", "right"]),
    "keys": ActionSpec.keys(["left", "right", "fire", "jump"], max_keys=2),
    "multi_discrete": ActionSpec.multi_discrete([3, 2, 300], names=["move", "fire", "weapon"]),
    "continuous": ActionSpec.continuous(
        [-1.0, 0.0], [1.0, 10.0], names=["turn", "gas"], bins=11, mu_law=[True, False]
    ),
}


@pytest.fixture(params=sorted(ACTION_SPECS))
def any_actions(request: pytest.FixtureRequest) -> ActionSpec:
    """A small spec of every kind of action, one after the other."""
    return ACTION_SPECS[request.param]


@pytest.fixture
def action_spec() -> ActionSpec:
    """Three choices: noop, left, right."""
    return ACTION_SPECS["discrete"]


@pytest.fixture
def code_spec() -> CodeSpec:
    """300 codes (so uint16) on a grid of 2 x 3, no temporal compression."""
    return CodeSpec(vocab_size=300, grid_height=2, grid_width=3, code_dim=4)


@pytest.fixture
def tokenizer_spec(code_spec: CodeSpec) -> TokenizerSpec:
    """Frames of 16 x 24, exact size only."""
    return TokenizerSpec(
        name="tiny",
        codes=code_spec,
        height=16,
        width=24,
        resize="exact",
        fps=35.0,
        frame_skip=4,
        compute_dtype="float32",
        fingerprint="0123456789abcdef" * 4,
    )


@pytest.fixture
def episodes_spec(action_spec: ActionSpec) -> EpisodesSpec:
    """Frames of 16 x 24 at 8.75 per second."""
    return EpisodesSpec(
        actions=action_spec,
        height=16,
        width=24,
        fps=8.75,
        frame_skip=4,
        source={"environment": "test", "seed": 0},
    )


@pytest.fixture
def write_episode() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Write one random episode; return its frames and raw actions."""

    def write(
        folder: Path,
        key: str,
        /,
        *,
        spec: EpisodesSpec,
        num_frames: int,
        seed: int = 0,
        labelled: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, num_frames])
        frames = rng.integers(0, 256, (num_frames, spec.height, spec.width, 3), np.uint8)
        slots = random_slots(spec.actions, num_frames - 1, rng)
        actions = spec.actions.decode(slots)
        if not (folder / "episodes.json").exists():
            spec.write(folder)
        with EpisodeWriter(folder, key, spec=spec) as writer:
            for frame in frames:
                writer.append(frame)
            rewards = np.arange(num_frames - 1, dtype=np.float32)
            writer.finish(actions if labelled else None, rewards=rewards)
        return frames, actions

    return write


def random_slots(actions: ActionSpec, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Slots of random valid actions."""
    if actions.kind == "keys":
        raw = np.zeros((steps, len(actions.names)), np.int64)
        for row in raw:
            count = rng.integers(0, actions.num_slots + 1)
            row[rng.permutation(len(row))[:count]] = 1
        return actions.encode(raw)
    return rng.integers(0, np.asarray(actions.sizes, np.int64), (steps, actions.num_slots))


@pytest.fixture
def token_episodes() -> Callable[..., list[TokenEpisode]]:
    """Make random token episodes of the given lengths in pixel frames."""

    def make(
        codes: CodeSpec, actions: ActionSpec, lengths: list[int], *, first: int = 0
    ) -> list[TokenEpisode]:
        episodes = []
        for number, num_frames in enumerate(lengths, start=first):
            rng = np.random.default_rng([number, num_frames])
            shape = codes.codes_shape(codes.latent_frames(num_frames))
            episodes.append(
                TokenEpisode(
                    key=f"episode-{number:04d}",
                    codes_thw=rng.integers(0, codes.vocab_size, shape).astype(codes.dtype),
                    slots_TA=random_slots(actions, num_frames - 1, rng),
                    num_frames=num_frames,
                    split="validation" if number % 3 == 2 else "train",
                    metadata={"return": number / 2},
                )
            )
        return episodes

    return make


@pytest.fixture
def write_shards(token_episodes, tokenizer_spec, action_spec) -> Callable[..., list[TokenEpisode]]:
    """Write a folder of token shards; return the episodes, in order."""

    def write(
        folder: Path,
        /,
        *,
        lengths: tuple[tuple[int, ...], ...] = ((5, 1, 9), (4, 7)),
        tokenizer: TokenizerSpec = tokenizer_spec,
        actions: ActionSpec = action_spec,
        unlabelled: tuple[int, ...] = (),
    ) -> list[TokenEpisode]:
        folder.mkdir(parents=True, exist_ok=True)
        episodes: list[TokenEpisode] = []
        records: list[ShardRecord] = []
        for index, shard in enumerate(lengths):
            part = [
                replace(episode, slots_TA=None) if number in unlabelled else episode
                for number, episode in enumerate(
                    token_episodes(tokenizer.codes, actions, list(shard), first=len(episodes)),
                    start=len(episodes),
                )
            ]
            records.append(write_shard(folder, index, part, codes=tokenizer.codes, actions=actions))
            episodes += part
        codes = tokenizer.codes
        levels = (codes.num_levels,) if codes.num_levels > 1 else ()
        shape = (*levels, codes.vocab_size, codes.code_dim)
        write_manifest(
            folder,
            records,
            tokenizer=tokenizer,
            actions=actions,
            codebook_VZ=np.random.default_rng(7).normal(size=shape).astype(np.float32),
            fps=8.75,
            frame_skip=4,
            metrics={"psnr_db": 31.5},
            source={"episodes": "test"},
        )
        return episodes

    return write


@pytest.fixture
def may_refuse() -> Callable[..., AbstractContextManager[None]]:
    """A block that may raise one error of ours, its message beginning with where; nothing else."""

    @contextmanager
    def block(error: type[Exception], /, *where: str) -> Iterator[None]:
        try:
            yield
        except error as refusal:
            message = str(refusal)
            assert message.startswith(where), message

    return block


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], bool]:
    """Run a function in a forked process that dies at a failpoint; return whether it got there."""

    def run(failpoint: str, work: Callable[[], object]) -> bool:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ["WORLDLOOM_FAILPOINT"] = failpoint
                work()
                status = 0
            except BaseException as error:  # pytest must not go on in the child
                sys.__stderr__.write(f"{error!r}\n")
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0, f"{failpoint}: the work failed by itself"
        return False

    return run


_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x", "1", "../../x",
    "/abs", "a\nb", "\ud800", "\0", "é" * 300, [], [1], [[]], {}, {"a": 1}, [None] * 3, "train",
)  # fmt: skip


@pytest.fixture
def mutations() -> Callable[..., Iterator[Any]]:
    """Yield `count` copies of JSON values, each with a few places changed, dropped or added."""

    def mutate(value: Any, rng: random.Random) -> Any:
        if isinstance(value, dict) and value and rng.random() < 0.9:
            copy = dict(value)
            key = rng.choice(sorted(copy))
            choice = rng.random()
            if choice < 0.1:
                del copy[key]
            elif choice < 0.2:
                copy[rng.choice(["unknown", "", key + "s", key[:-1]])] = copy[key]
            else:
                copy[key] = mutate(copy[key], rng)
            return copy
        if isinstance(value, list) and value and rng.random() < 0.8:
            copy = list(value)
            index = rng.randrange(len(copy))
            choice = rng.random()
            if choice < 0.1:
                del copy[index]
            elif choice < 0.2:
                copy.append(copy[index])
            else:
                copy[index] = mutate(copy[index], rng)
            return copy
        if isinstance(value, int) and rng.random() < 0.5:
            return value + rng.choice([-512, -1, 1, 512, 1 << 40])
        if isinstance(value, str) and value and rng.random() < 0.3:
            index = rng.randrange(len(value))
            return value[:index] + chr(rng.randrange(1, 300)) + value[index + 1 :]
        return rng.choice(_STRANGE)

    def generate(value: Any, *, seed: int, count: int) -> Iterator[Any]:
        rng = random.Random(seed)
        for _ in range(count):
            changed = value
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                changed = mutate(changed, rng)
            yield changed

    return generate
