"""Folders of token shards, and how they are asked for -> what a training reads, and when.

shards, weights, stream  ->  TrainingData: windows to learn from, windows held out
batches, made in order   ->  Ahead: the next one is made while one is learned from
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from worldloom.common import ActionSpec, ConfigError, TokenShards, fingerprint

from .mixture import Mixture, check_alike, weights_of
from .spec import DynamicsSpec
from .training_config import StreamConfig
from .windows import StoredWindows, Windows, WindowSource

_CHECKED_BYTES = 1 << 26
_CHECKED_EPISODES = 1 << 14
"""As much as is read within a second."""
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a training learns from, and what it is measured on."""

    windows: WindowSource
    held_out: tuple[WindowSource, ...]
    """Of every data set its own; what it learns from, where none of it is held out."""
    weights: tuple[float, ...]
    """How often each data set is drawn, in any unit."""
    settings: dict[str, Any]
    """What a run must go on with: every folder's hash, weights, the order of a stream."""

    @classmethod
    def open(
        cls,
        shards: Sequence[TokenShards],
        /,
        *,
        window_frames: int,
        weights: Sequence[float] | None = None,
        stream: StreamConfig | None = None,
    ) -> "TrainingData":
        """Open the windows of one folder, of several mixed by weight, or of a stream.

        Args:
            shards: the folders, at least one; opened with `tars_elsewhere` for a stream.
            window_frames: latent frames per window, t, at least 2.
            weights: one for each folder; None weighs latent frames alike, wherever they are.
            stream: where the tars are, if not in the folder.

        What is small is checked whole here. Of large data every window is checked when it is read.

        Raises:
            ConfigError: if the weights do not fit, or several folders shall be streamed.
            FormatError: if a split has nothing to predict, or a code or an action cannot be one.
            MismatchError: if the folders do not speak the same codes and actions.
        """
        if not shards:
            raise ConfigError("shards: none are named; name at least one folder")
        check_alike(shards)
        actions = DynamicsSpec.of(*shards).actions
        weighed = weights_of(shards, weights)
        pins = [_pin(one) for one in shards]
        settings: dict[str, Any] = {"shards": pins[0] if len(pins) == 1 else pins}
        if len(shards) > 1:
            settings["weights"] = list(weighed)
        windows: WindowSource
        if stream is not None:
            from .streaming import WindowStream  # it imports webdataset, which takes a while

            if len(shards) > 1:
                raise ConfigError(
                    f"stream: {len(shards)} folders of shards, but one address; a stream is of one "
                    "folder"
                )
            windows = WindowStream(shards[0], "train", window_frames=window_frames, stream=stream)
            settings["stream"] = {"lanes": stream.lanes, "buffer_windows": stream.buffer_windows}
        else:
            for one in shards:
                _check_whole(one)
            parts = [
                Windows(one, "train", window_frames=window_frames, actions=actions)
                for one in shards
            ]
            windows = parts[0] if len(parts) == 1 else Mixture(parts, weighed)
        held_out = tuple(
            open_held_out(one, window_frames=window_frames, stream=stream, actions=actions)
            for one in shards
        )
        return cls(windows, held_out, weighed, settings)


def open_held_out(
    shards: TokenShards,
    /,
    *,
    window_frames: int,
    stream: StreamConfig | None = None,
    actions: ActionSpec | None = None,
) -> WindowSource:
    """Return the windows on which a model of these shards is measured.

    Args:
        shards: one folder.
        window_frames: latent frames per window, t, at least 2.
        stream: where the tars are, if not in the folder.
        actions: those of the model, where the shards have none; else None will do.

    Raises:
        FormatError: if the split has nothing to predict.
    """
    split = "validation" if shards.split("validation") else "train"
    if stream is None:
        return Windows(shards, split, window_frames=window_frames, actions=actions)
    from .streaming import KeptWindows

    return KeptWindows(shards, split, window_frames=window_frames, stream=stream)


def _check_whole(shards: TokenShards) -> None:
    """Refuse codes and actions that cannot be, where looking at all of them takes a moment."""
    rows = shards.episodes
    size_bytes = sum(row.codes_bytes + row.actions_bytes for row in rows)
    if size_bytes > _CHECKED_BYTES or len(rows) > _CHECKED_EPISODES:
        return
    for episode in range(len(rows)):
        shards.codes_thw(episode)
        shards.slots_TA(episode)


def _pin(shards: TokenShards) -> str:
    """Return the hash of what is learned from: codes, actions, splits and what they mean."""
    names = ("tokenizer", "actions", "fps", "frame_skip", "codebook", "shards", "episodes")
    return fingerprint({name: shards.manifest[name] for name in names}, [])


class Ahead:
    """Batches made in a thread, in their order, at most two ahead; counts how long one waited.

    with Ahead(windows, range(step, num_steps), size=32, seed=0) as batches:
        stored = batches.next()
    """

    def __init__(  # noqa: PLR0913 - those of WindowSource.stored
        self,
        windows: WindowSource,
        indices: Iterable[int],
        /,
        *,
        size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.waited_s = 0.0
        """Seconds that `next` did not return at once."""

        def make() -> Generator[StoredWindows, None, None]:
            for index in indices:
                yield windows.stored(index, size=size, seed=seed, rank=rank, num_ranks=num_ranks)

        self._interrupt: Callable[[], None] = getattr(windows, "interrupt", lambda: None)
        self._close: Callable[[], None] = getattr(windows, "close", lambda: None)
        self._made: Queue[StoredWindows | BaseException] = Queue(maxsize=1)
        self._next: StoredWindows | BaseException | None = None
        self._stopping = Event()
        # A daemon: a stream whose sender is stuck must not keep the process from ending.
        self._thread = Thread(target=self._run, args=(make(),), name="windows", daemon=True)
        self._thread.start()

    def next(self) -> StoredWindows:
        """Return the next batch; raise what making it raised, in its turn.

        Raises:
            StopIteration: after the last.
        """
        self.wait()
        made, self._next = self._next, None
        if isinstance(made, BaseException):
            raise made
        assert made is not None
        return made

    def wait(self, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the next batch, or until something else is so; tell whether it is there."""
        began = time.monotonic()
        while self._next is None and not unless():
            with suppress(Empty):
                self._next = self._made.get(timeout=_LOOK_EVERY_S)
        self.waited_s += time.monotonic() - began
        return self._next is not None

    def close(self) -> None:
        """Stop making batches, and let go of streams."""
        self._stopping.set()
        self._interrupt()
        with suppress(Empty):
            self._made.get_nowait()
        self._thread.join(timeout=5)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, batches: Generator[StoredWindows, None, None]) -> None:
        """Make one batch after the other."""
        try:
            for batch in batches:
                if not self._give(batch):
                    return
            self._give(StopIteration())
        except BaseException as error:  # raised where the batch is wanted
            self._give(error)
        finally:
            self._close()

    def _give(self, made: StoredWindows | BaseException) -> bool:
        """Wait until there is room; return False if nobody wants it any more."""
        while not self._stopping.is_set():
            with suppress(Full):
                self._made.put(made, timeout=0.1)
                return True
        return False
