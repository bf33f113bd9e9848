"""The unit of work of `worldloom tokenize`: the number of a shard -> the shard and its marker.

    TokenizeJob  ->  open_unit_worker  ->  UnitWorker.answer(index)  ->  UnitReport

Every engine (this process, a crew of processes, a rank of torchrun or Slurm, Ray) is only a way to
call `answer` for the shards that are missing, in any order and anywhere. A shard's bytes follow
from the job alone: which episodes it holds and which of them are encoded side by side is decided
by the sorted keys, and a CPU computes with as many threads everywhere. So a unit that is done twice
is done alike, and what it writes appears whole or not at all.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from worldloom.common import (
    Episodes,
    FormatError,
    ShardRecord,
    TokenEpisode,
    remove_leftovers,
    shard_name,
    write_shard,
)
from worldloom.tokenizer import VideoTokenizer, load_tokenizer

from .ahead import Ahead
from .encoding import (
    EpisodeFrames,
    Group,
    SquaredErrors,
    batches,
    encode_groups,
    reconstructed_clips,
    side_by_side,
    squared_errors,
)
from .shard_plan import read_plan, require_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeJob:
    """All that a worker on any machine needs to know: plain values, and absolute paths."""

    episodes: Path
    tokenizer: str
    """As `load_tokenizer` takes it."""
    output: Path
    device: str
    """Where it computes: cpu, cuda, cuda:1 ..."""
    threads: int
    """Threads that torch computes with; 0 leaves them as they are. On a CPU another number may
    flip a code at a tie."""
    shard_episodes: int
    batch_episodes: int
    skip_bad: int
    """Damaged episodes that are left out; one more stops the work."""
    plan: Mapping[str, Any]
    """What OUTPUT/plan.json says."""
    measure: bool = True
    """Measure the reconstruction; off for who measures the speed of encoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReport:
    """What was done, when it is done for good."""

    index: int
    """Number of the shard."""
    num_episodes: int
    num_frames: int
    size_bytes: int
    seconds: float
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Keys of the damaged episodes that were left out, and what is wrong with each."""


def open_unit_worker(job: TokenizeJob, /) -> "UnitWorker":
    """Load what a worker needs, and check that it is what the plan was made of.

    Raises:
        MismatchError: if the episodes or the tokenizer are others here than the plan's.
    """
    episodes = Episodes(job.episodes)
    tokenizer = load_tokenizer(job.tokenizer, device=job.device)
    here = make_plan(
        episodes,
        tokenizer,
        shard_episodes=job.shard_episodes,
        batch_episodes=job.batch_episodes,
    )
    require_plan(job.plan, here, output=job.output)
    return UnitWorker(job, episodes, tokenizer)


def make_plan(
    episodes: Episodes, tokenizer: VideoTokenizer, /, *, shard_episodes: int, batch_episodes: int
) -> dict[str, Any]:
    """Return the content of plan.json: all that the bytes of the shards follow from."""
    return {
        "tokenizer": tokenizer.spec.fingerprint,
        "source": episodes.fingerprint(),
        "num_episodes": len(episodes.keys),
        "shard_episodes": shard_episodes,
        "batch_episodes": batch_episodes,
    }


def units_of(keys: Sequence[str], shard_episodes: int, /) -> list[Sequence[str]]:
    """Return the keys of the episodes of every shard."""
    return list(batches(keys, shard_episodes))


def measured_split(episodes: Episodes, /) -> str:
    """Return the split whose reconstruction is measured: "train" only where none is held out."""
    held_out = any(episodes.split_of(key) == "validation" for key in episodes.keys)
    return "validation" if held_out else "train"


class UnitWorker:
    """Does one unit after the other; what a process of a crew, or an actor, holds."""

    def __init__(self, job: TokenizeJob, episodes: Episodes, tokenizer: VideoTokenizer, /) -> None:
        self._job = job
        self._episodes = episodes
        self._tokenizer = tokenizer
        self._units = units_of(episodes.keys, job.shard_episodes)
        self._split = measured_split(episodes)
        self._skipped: dict[str, str] = {}
        self._ahead: tuple[int, _Reading] | None = None
        self._threads_before = torch.get_num_threads()
        if job.threads:
            torch.set_num_threads(job.threads)

    @property
    def greeting(self) -> str:
        """Where it computes."""
        return self._job.device

    def answer(self, index: int, /, *, following: int | None = None) -> UnitReport:
        """Write one shard and its marker, durable on return.

        Args:
            index: its number.
            following: the one that will be asked for next, if that is known: its first frames are
                read while this one is measured and written.

        Raises:
            FormatError: if an episode is damaged, and more are than may be skipped.
            MismatchError: if somebody began the folder anew with another plan.
            StorageError: if the disk refuses.
        """
        began = time.perf_counter()
        # What a killed process left of this very unit; others may be writing theirs just now.
        remove_leftovers(self._job.output, of=unit_files(index))
        skipped: dict[str, str] = {}
        try:
            record = self._make(index, self._units[index], skipped, following)
        except FormatError as error:
            if not self._job.skip_bad:
                raise
            # What is encoded beside whom must not depend on where the damage lies: all of the
            # unit's damaged episodes are found first, then it is made of the others, anew.
            skipped = self._damaged(index, error)
            good = [key for key in self._units[index] if key not in skipped]
            record = self._make(index, good, skipped, following)
        self._skipped |= skipped
        return UnitReport(
            index=index,
            num_episodes=len(record.episodes),
            num_frames=sum(row.num_frames for row in record.episodes),
            size_bytes=record.size_bytes,
            seconds=time.perf_counter() - began,
            skipped=skipped,
        )

    def close(self) -> None:
        """Stop reading ahead, and give torch its threads back."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None
        torch.set_num_threads(self._threads_before)

    def _make(
        self, index: int, keys: Sequence[str], skipped: Mapping[str, str], following: int | None
    ) -> ShardRecord:
        """Encode, measure and write one unit."""
        with closing(self._reading(index, keys)) as reading:
            codes = encode_groups(reading.groups, self._tokenizer)
        if following is not None:
            self._ahead = following, self._read(self._units[following])
        latent_frames = self._tokenizer.spec.codes.latent_frames
        codes_thw = [codes[i][: latent_frames(n)] for i, n in enumerate(reading.lengths)]
        measured = self._measure(keys, codes_thw, reading.lengths)
        job = self._job
        require_plan(read_plan(job.output), job.plan, output=job.output)
        return write_shard(
            job.output,
            index,
            self._token_episodes(keys, codes_thw),
            codes=self._tokenizer.spec.codes,
            actions=self._episodes.spec.actions,
            skipped=skipped,
            measured=asdict(measured),
        )

    def _reading(self, index: int, keys: Sequence[str]) -> "_Reading":
        """Return the reading of a unit: the one that has begun already, or a new one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            number, reading = ahead
            if number == index and reading.keys == keys:
                return reading
            reading.close()
        return self._read(keys)

    def _read(self, keys: Sequence[str]) -> "_Reading":
        return _Reading(self._episodes, keys, self._tokenizer, self._job.batch_episodes)

    def _measure(
        self, keys: Sequence[str], codes: Sequence[Tensor], lengths: Sequence[int]
    ) -> SquaredErrors:
        """Return the errors of the unit's held-out episodes, decoded again."""
        rows = [i for i, key in enumerate(keys) if self._episodes.split_of(key) == self._split]
        if not self._job.measure or not rows:
            return SquaredErrors()
        clips = reconstructed_clips(
            [EpisodeFrames(self._episodes, keys[row], self._tokenizer.spec) for row in rows],
            [lengths[row] for row in rows],
            self._tokenizer,
            batch=self._job.batch_episodes,
            codes=[codes[row] for row in rows],
        )
        with closing(clips):
            return squared_errors(clips)

    def _token_episodes(
        self, keys: Sequence[str], codes: Sequence[Tensor]
    ) -> Iterator[TokenEpisode]:
        """Yield the encoded episodes of a unit with what else belongs to them."""
        dtype = self._tokenizer.spec.codes.dtype
        for key, codes_thw in zip(keys, codes, strict=True):
            with self._episodes.open(key) as episode:
                yield TokenEpisode(
                    key=key,
                    codes_thw=codes_thw.numpy().astype(dtype),
                    slots_TA=episode.slots_TA,
                    num_frames=episode.num_frames,
                    split=self._episodes.split_of(key),
                    metadata=episode.metadata,
                )

    def _damaged(self, index: int, error: FormatError) -> dict[str, str]:
        """Return the unit's damaged episodes, or raise if they are none or too many."""
        found: dict[str, str] = {}
        for key in self._units[index]:
            reason = self._what_is_wrong(key)
            if reason is None:
                continue
            if len(self._skipped) + len(found) >= self._job.skip_bad:
                raise too_many_damaged(
                    {**self._skipped, **found, key: reason}, self._job.skip_bad, self._job.episodes
                )
            found[key] = reason
        if not found:
            raise error
        return found

    def _what_is_wrong(self, key: str) -> str | None:
        """Read all of an episode; return the reason if it cannot be used, without the folder."""
        folder = self._episodes.folder
        try:
            with self._episodes.open(key) as episode:
                for _ in episode.pieces():
                    pass
                _ = episode.slots_TA
        except FormatError as error:
            # What is written into markers must not depend on where the folder lies.
            return str(error).replace(f"{folder}/", "")
        return None


class _Reading:
    """The frames of a unit, read in a thread from the moment that this is made."""

    def __init__(
        self, episodes: Episodes, keys: Sequence[str], tokenizer: VideoTokenizer, batch: int
    ) -> None:
        self.keys = keys
        self.lengths: list[int] = []
        """Frames of each episode; there as soon as the first of `groups` is."""
        self.groups = Ahead(self._read(episodes, tokenizer, batch))

    def _read(
        self, episodes: Episodes, tokenizer: VideoTokenizer, batch: int
    ) -> Generator[Group, None, None]:
        for key in self.keys:
            with episodes.open(key) as episode:
                self.lengths.append(episode.num_frames)
        videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in self.keys]
        yield from side_by_side(videos, self.lengths, batch=batch)

    def close(self) -> None:
        """Stop reading."""
        self.groups.close()


def unit_files(index: int, /) -> set[str]:
    """Return the names of the files that a unit writes."""
    tar = shard_name(index)
    return {tar, Path(tar).with_suffix(".json").name}


def too_many_damaged(damaged: Mapping[str, str], bound: int, episodes: Path, /) -> FormatError:
    """Return the error that stops the work at one damaged episode too many, the last of these."""
    *before, last = damaged
    skipped = (
        f" {len(before)} damaged before it ({', '.join(before[:5])}{', ...' * (len(before) > 5)}) "
        f"are as many as --skip-bad {bound} allows;"
        if before
        else ""
    )
    return FormatError(
        f"{episodes}/{damaged[last]};{skipped} mend or remove it, or allow one more with "
        f"--skip-bad {len(damaged)}. What is finished is kept"
    )
