"""Token shards that are elsewhere -> windows, as the tars pass by in a pipe.

    SHARDS/{manifest.json, codebook.safetensors}, 'https://host/corpus/{file}'  ->  batch i

For corpora that do not fit on the training machine; where they do, `Windows` is faster and draws
from everything. The tars are opened by webdataset (https and others by commands of its own, `pipe:`
through a shell) and read by us: raw bytes, compared with the manifest (common/shard_stream.py).

The order is a pure function of the seed and the manifest. In every pass (epoch) all shards come
once, permuted, each dealt whole to the lane that has had the fewest windows. A lane is one open
stream and a buffer in which its windows are shuffled; row i of a batch is of lane i % lanes. So the
processes take whole lanes and read nothing twice; how many they are changes no window; fewer shards
than lanes means that lanes are in different passes, never that one is idle or repeats another.

To resume, what was consumed is counted by the manifest, and whole shards are never opened: reading
begins where the oldest window can lie that may still be in the buffer.

webdataset's own splitting and shuffling are not used: the former loses samples or raises where
shards do not divide evenly, the latter cannot be resumed.
"""

import heapq
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, dropwhile, islice
from typing import Any, TypeVar

import numpy as np
from webdataset import DataPipeline
from webdataset.tariterators import url_opener
from worldloom.common import (
    CodeArray,
    ConfigError,
    SlotArray,
    StorageError,
    TokenShards,
    numpy_stream,
    stream_episodes,
)

from .training_config import StreamConfig
from .windows import StoredWindows, WindowBatch, episodes_of, rows_of

Item = TypeVar("Item")

_KEPT_BUFFER = 256
"""Windows shuffled of those that are kept: of more, more shards would have to be read."""


@dataclass(frozen=True, slots=True)
class _Visit:
    """One shard in one pass of one lane."""

    epoch: int
    shard: int
    position: int
    """How many windows the lane has had before."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A window before it is read."""

    episode: int
    first: int
    """First latent frame."""
    position: int
    """Among the lane's windows as they come."""
    key: float
    """When it leaves the buffer, in positions of what comes in."""


@dataclass(frozen=True, slots=True)
class _Window:
    """A window as stored, cut out of its episode, which can then be let go."""

    codes_thw: CodeArray
    slots_TA: SlotArray


class WindowStream:
    """Windows of one split of a folder of token shards whose tars come as streams."""

    def __init__(
        self, shards: TokenShards, split: str, /, *, window_frames: int, stream: StreamConfig
    ) -> None:
        """Count the windows; nothing is opened before the first batch.

        Args:
            shards: opened with `tars_elsewhere`.
            split: "train" or "validation".
            window_frames: latent frames per window, t, at least 2.
            stream: where the tars are, and how they are shuffled.

        Raises:
            FormatError: if no episode of the split has two latent frames.
            ValueError: if a window would have nothing to predict.
        """
        self.shards = shards
        self.window_frames = window_frames
        self._stream = stream
        self._lane_buffer = -(-stream.buffer_windows // stream.lanes)
        wanted = set(episodes_of(shards, split, window_frames=window_frames))
        self._episodes = {
            shard: np.array(mine)
            for shard in range(len(shards.files))
            if (mine := [i for i in shards.in_shard(shard) if i in wanted])
        }
        lengths = np.array([row.latent_frames for row in shards.episodes])
        self.latent_frames = int(lengths[sorted(wanted)].sum())
        """Latent frames in all."""
        # How many places a window has in each episode, and how many windows a pass takes: about
        # as many as show every frame once.
        self._places = np.maximum(1, lengths - window_frames + 1)
        self._counts = np.minimum(self._places, -(-lengths // window_frames))
        self._shard_counts = {
            shard: int(self._counts[mine].sum()) for shard, mine in self._episodes.items()
        }
        self._lanes: dict[int, Generator[_Window, None, None]] = {}
        self._next: tuple[int, ...] | None = None
        self._open: set[_Sent] = set()

    def __len__(self) -> int:
        """Number of windows in one pass."""
        return sum(self._shard_counts.values())

    def batch(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> WindowBatch:
        """Return this rank's rows of the index-th batch of `size` windows.

        Row i of what is returned is row rank + i * num_ranks of the whole batch. The batch after
        the last one goes on in the open streams; any other begins anew, where it must.

        Raises:
            ConfigError: if lanes cannot be dealt out evenly, or the url is of an unknown kind.
            FormatError: if a shard is not what the manifest says.
            StorageError: if a shard cannot be had.
        """
        return self.stored(index, size=size, seed=seed, rank=rank, num_ranks=num_ranks).to("cpu")

    def stored(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> StoredWindows:
        """Return what `batch` returns, with codes in the type of the shards."""
        asked = (index, size, seed, rank, num_ranks)
        rows = range(size)[rows_of(rank, num_ranks, size=size)]
        if self._next != asked:
            self.close()
            self._stream.check_dealing(size=size, num_ranks=num_ranks)
            start = index * (size // self._stream.lanes)
            mine = range(rank, self._stream.lanes, num_ranks)
            self._lanes = {lane: self._windows(lane, seed, start) for lane in mine}
        self._next = None  # until these are through: an error leaves the lanes uneven
        stored = StoredWindows(
            len(rows),
            codes=self.shards.codes,
            actions=self.shards.actions,
            window_frames=self.window_frames,
        )
        for number, row in enumerate(rows):
            window = next(self._lanes[row % self._stream.lanes])
            stored.put(number, window.codes_thw, window.slots_TA)
        self._next = (index + 1, size, seed, rank, num_ranks)
        return stored

    def origins(self, index: int, /, *, size: int, seed: int) -> list[tuple[str, int]]:
        """Return (key of the episode, first latent frame) of every window; reads no shard."""
        start = index * (size // self._stream.lanes)
        lanes = [self._planned(lane, seed, start) for lane in range(self._stream.lanes)]
        places = [next(lanes[row % len(lanes)]) for row in range(size)]
        return [(self.shards.episodes[place.episode].key, place.first) for place in places]

    def close(self) -> None:
        """Let go of the open streams; the next batch opens them again."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes = {}
        self._next = None

    def interrupt(self) -> None:
        """Kill the commands that are being read from, in whatever thread: reading then fails."""
        for sent in list(self._open):
            sent.kill()

    def _windows(self, lane: int, seed: int, start: int) -> Generator[_Window, None, None]:
        """Yield the windows of a lane from the start-th on, without end."""
        visits = self._visits(lane, seed, start)
        first = next(visits)
        places = self._read(_then(first, visits), seed)
        try:
            yield from islice(_shuffled(places), start - first.position, None)
        finally:
            places.close()

    def _planned(self, lane: int, seed: int, start: int) -> Iterator[_Place]:
        """Yield the places of the windows that `_windows` yields."""
        visits = self._visits(lane, seed, start)
        first = next(visits)
        places = (
            (place, place)
            for visit in _then(first, visits)
            for place in self._places_in(visit, seed)
        )
        return islice(_shuffled(places), start - first.position, None)

    def _visits(self, lane: int, seed: int, start: int) -> Iterator[_Visit]:
        """Yield the shards of a lane, from the first that may hold its start-th window."""
        # A window leaves the buffer at most so many after it came in.
        oldest = start - self._lane_buffer
        return dropwhile(
            lambda visit: visit.position + self._shard_counts[visit.shard] <= oldest,
            self._dealt(lane, seed),
        )

    def _dealt(self, lane: int, seed: int) -> Iterator[_Visit]:
        """Yield the shards of a lane, pass after pass."""
        shards = np.array(list(self._shard_counts))
        had = [0] * self._stream.lanes
        for epoch in count():
            for shard in numpy_stream(seed, "stream-shards", epoch).permutation(shards).tolist():
                taker = had.index(min(had))
                if taker == lane:
                    yield _Visit(epoch, shard, had[lane])
                had[taker] += self._shard_counts[shard]

    def _places_in(self, visit: _Visit, seed: int) -> list[_Place]:
        """Return the windows of a visit, in the order in which they come.

        Each episode is cut into as many stretches of places as it has windows, and every window
        begins anywhere in its own: all places are equally likely, and the windows lie apart.
        """
        episodes = self._episodes[visit.shard]
        counts = self._counts[episodes]
        total = int(counts.sum())
        rng = numpy_stream(seed, "stream-windows", visit.epoch, visit.shard)
        which = np.repeat(np.arange(len(episodes)), counts)
        nth = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        places = self._places[episodes][which]
        firsts = ((nth + rng.random(total)) * places / counts[which]).astype(np.int64)
        positions = visit.position + np.arange(total)
        keys = positions + self._lane_buffer * rng.random(total)
        return [
            _Place(*place)
            for place in zip(
                episodes[which].tolist(),
                np.minimum(firsts, places - 1).tolist(),
                positions.tolist(),
                keys.tolist(),
                strict=True,
            )
        ]

    def _read(
        self, visits: Iterable[_Visit], seed: int
    ) -> Generator[tuple[_Place, _Window], None, None]:
        """Yield every window of these visits as its shard passes by."""

        def sources() -> Iterator[dict[str, Any]]:
            for visit in visits:
                name = self.shards.files[visit.shard].file
                yield {"url": self._stream.url.replace("{file}", name), "visit": visit}

        def cut(samples: Iterable[dict[str, Any]]) -> Iterator[tuple[_Place, _Window]]:
            for sample in samples:
                visit = sample["visit"]
                sent = _Sent(sample["stream"], sample["url"])
                self._open.add(sent)
                try:
                    yield from self._cut(visit.shard, self._places_in(visit, seed), sent)
                finally:
                    self._open.discard(sent)
                    sent.end()

        pipeline = DataPipeline(sources, url_opener, _refusals, cut)
        yield from pipeline

    def _cut(
        self, shard: int, places: Sequence[_Place], sent: "_Sent"
    ) -> Iterator[tuple[_Place, _Window]]:
        """Yield the windows of a shard, cut out of its episodes as these come."""
        t, r = self.window_frames, self.shards.codes.frames_per_latent
        mine: dict[int, list[_Place]] = {}
        for place in places:
            mine.setdefault(place.episode, []).append(place)
        for episode, codes_thw, slots_TA in stream_episodes(
            self.shards, shard, sent, where=sent.url, only=mine
        ):
            for place in mine[episode]:
                first = place.first
                yield (
                    place,
                    _Window(
                        codes_thw[first : first + t].copy(),
                        slots_TA[first * r : (first + t - 1) * r].copy(),
                    ),
                )


class _Sent:
    """A stream that webdataset opened; that a command failed is an error, not an early end."""

    def __init__(self, stream: Any, url: str) -> None:
        self.url = url
        self._stream = stream
        self._process = getattr(stream, "proc", None)

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end, if that is a good one."""
        try:
            content: bytes = self._stream.read(size)
            if not content:
                self._stream.close()  # which asks how the command ended
        except (OSError, ValueError) as error:
            how = str(error) if self._process is None else f"exit {self._process.poll()}"
            raise StorageError(
                f"{self.url}: broke off ({how:.200}); see that this command or address gives the "
                "whole shard, then run the same command again to continue"
            ) from error
        return content

    def kill(self) -> None:
        """Kill the command, if there is one and it is not through."""
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """Be through with the stream, wherever it is; what is not read is not wanted."""
        self.kill()
        self._stream.ignore_errors = True  # of webdataset's pipes: that a command was killed
        with suppress(OSError):
            self._stream.close()


def _refusals(samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pass opened streams on; turn what webdataset says of the others into sentences."""
    try:
        yield from samples
    except OSError as error:
        raise StorageError(
            f"{error.args[-1]!s:.200}: cannot be opened ({error!s:.200}); see to the address and "
            "to the command that fetches it, then run the same command again to continue"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"stream: {error.args[0]!s:.300}; --stream takes a path, an https address or "
            "pipe:COMMAND, with {file} in it"
        ) from error


def _then(first: Item, rest: Iterator[Item]) -> Iterator[Item]:
    """Yield an item, and then the others."""
    yield first
    yield from rest


def _shuffled(items: Iterable[tuple[_Place, Item]]) -> Iterator[Item]:
    """Yield items by their keys; whatever comes later has a key of at least its position."""
    buffer: list[tuple[float, int, Item]] = []
    for place, item in items:
        while buffer and buffer[0][0] < place.position:
            yield heapq.heappop(buffer)[2]
        heapq.heappush(buffer, (place.key, place.position, item))


class KeptWindows:
    """The first windows of a stream, read once: what a model is validated on again and again."""

    def __init__(
        self, shards: TokenShards, split: str, /, *, window_frames: int, stream: StreamConfig
    ) -> None:
        """Take what `WindowStream` takes."""
        # One lane, so that any number of windows can be had, and of so small a buffer that few
        # shards are read for them.
        once = WindowStream(
            shards, split, window_frames=window_frames, stream=replace(stream, lanes=1)
        )
        buffer = min(stream.buffer_windows, _KEPT_BUFFER, len(once))
        self._stream = WindowStream(
            shards,
            split,
            window_frames=window_frames,
            stream=replace(stream, lanes=1, buffer_windows=buffer),
        )
        self._kept: dict[tuple[int, ...], StoredWindows] = {}

    @property
    def latent_frames(self) -> int:
        """Latent frames in all."""
        return self._stream.latent_frames

    def __len__(self) -> int:
        """Number of windows in one pass."""
        return len(self._stream)

    def batch(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> WindowBatch:
        """Return windows of the stream; where a pass has fewer, they come again."""
        return self.stored(index, size=size, seed=seed, rank=rank, num_ranks=num_ranks).to("cpu")

    def stored(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> StoredWindows:
        """Return what `batch` returns, with codes in the type of the shards."""
        asked = (index, size, seed, rank, num_ranks)
        if asked not in self._kept:
            few = min(size, len(self._stream))
            stored = self._stream.stored(index, size=few, seed=seed)
            self._stream.close()
            self._kept = {
                asked: stored.repeated(np.arange(size)[rows_of(rank, num_ranks, size=size)] % few)
            }
        return self._kept[asked]

    def origins(self, index: int, /, *, size: int, seed: int) -> list[tuple[str, int]]:
        """Return (key of the episode, first latent frame) of every window of a batch."""
        few = min(size, len(self._stream))
        places = self._stream.origins(index, size=few, seed=seed)
        return [places[row % few] for row in range(size)]
