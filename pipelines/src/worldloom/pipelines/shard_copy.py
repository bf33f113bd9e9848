"""Episodes of some folders of token shards -> another folder of them, with nothing encoded again.

    Source, ..., [[Pick, ...], ...]  ->  ShardCopy  ->  write_copy  ->  SHARDS/

A group of picks becomes a shard. An episode is read, checked and written at a time, so memory holds
one. What is written is as of `worldloom tokenize`: whole or not at all, a marker behind each shard,
the same bytes for the same picks; a copy that was stopped is continued by the next one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from worldloom.common import (
    FormatError,
    ShardRecord,
    TokenEpisode,
    TokenShards,
    file_sha256,
    finished_shard,
    progress,
    remove_leftovers,
    say,
    write_manifest,
    write_shard,
)

from .shard_plan import is_finished, keep_plan


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A folder of shards to copy from."""

    shards: TokenShards
    prefix: str = ""
    """What is put before its keys."""
    checked: dict[int, FormatError | None] = field(default_factory=dict)
    """Its shards that were compared with the manifest's hash, and what is wrong with each."""

    def key(self, episode: int, /) -> str:
        """Return the key that an episode gets."""
        return self.prefix + self.shards.episodes[episode].key

    def read(self, episode: int, /) -> TokenEpisode:
        """Return an episode under its new key, all of it checked.

        Raises:
            FormatError: naming the shard, if it is damaged.
        """
        row = self.shards.episodes[episode]
        self._require_whole(row.shard)
        return TokenEpisode(
            key=self.key(episode),
            codes_thw=self.shards.codes_thw(episode),
            slots_TA=self.shards.slots_TA(episode) if row.labelled else None,
            num_frames=row.num_frames,
            split=row.split,
            metadata=self.shards.metadata(episode),
        )

    def _require_whole(self, shard: int) -> None:
        """Refuse a shard of other bytes than were written: nobody knows which episode they hurt."""
        if shard not in self.checked:
            self.checked[shard] = None
            try:
                self.shards.check_hash(shard)
            except FormatError as error:
                self.checked[shard] = error
        found = self.checked[shard]
        if found is not None:
            raise found


@dataclass(frozen=True, slots=True)
class Pick:
    """An episode of a source."""

    source: Source
    episode: int

    @property
    def key(self) -> str:
        """The key that it gets."""
        return self.source.key(self.episode)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCopy:
    """A folder to write."""

    output: Path
    sources: Sequence[Source]
    """Those that are picked from; they agree in everything but their episodes."""
    groups: Sequence[Sequence[Pick]]
    """The episodes of each shard."""
    made_by: Mapping[str, Any]
    """The command and its settings: what tells this copy from another of the same sources."""

    @property
    def plan(self) -> dict[str, Any]:
        """What plan.json says, and no other copy's does."""
        return {
            **self.made_by,
            "sources": [manifest_sha256(source.shards) for source in self.sources],
            "num_episodes": sum(map(len, self.groups)),
            "num_shards": len(self.groups),
        }


def manifest_sha256(shards: TokenShards, /) -> str:
    """Return the hash of a manifest, which has those of everything else in the folder."""
    return file_sha256(shards.folder / "manifest.json")


def regroup(picks: Iterable[Pick], shard_episodes: int, /) -> list[list[Pick]]:
    """Return the picks in groups of `shard_episodes`; with 0, as the sources' shards are cut."""
    groups: list[list[Pick]] = []
    for pick in picks:
        last = groups[-1] if groups else []
        if shard_episodes:
            fits = 0 < len(last) < shard_episodes
        else:
            fits = bool(last) and _place(last[-1]) == _place(pick)
        if fits:
            last.append(pick)
        else:
            groups.append([pick])
    return groups


def _place(pick: Pick) -> tuple[int, int]:
    """Return in which shard of which source an episode lies."""
    return id(pick.source), pick.source.shards.episodes[pick.episode].shard


def write_copy(copy: ShardCopy, /, *, skip_bad: int = 0) -> int:
    """Write what of a copy is not there yet; return how many episodes it has.

    Args:
        copy: what to write.
        skip_bad: how many damaged episodes may be left out; each is named.

    Raises:
        ConfigError: if the output is not a folder of token shards.
        MismatchError: if it was begun as something else.
        FormatError: naming the source's shard that is damaged; what was finished is kept.
        StorageError: if the disk refuses.
    """
    output, first = copy.output, copy.sources[0].shards
    keep_plan(output, copy.plan)
    if is_finished(output):
        say(f"{output}: finished before, nothing to do")
        return len(TokenShards(output).episodes)
    codebook_VZ = first.codebook_VZ()  # a damaged one is found now, not after hours
    remove_leftovers(output)
    before = [finished_shard(output, index) for index in range(len(copy.groups))]
    records = {index: record for index, record in enumerate(before) if record is not None}
    pending = [index for index in range(len(copy.groups)) if index not in records]
    kept = len(records)
    damaged = _Damaged(skip_bad)
    for record in records.values():
        damaged.skipped |= record.skipped
    for index in progress(pending, f"writing {output}", total=len(before), done=kept):
        here: dict[str, str] = {}
        records[index] = write_shard(
            output,
            index,
            _read(copy.groups[index], damaged, here),
            codes=first.codes,
            actions=first.actions,
            skipped=here,
        )
    num_episodes = sum(len(record.episodes) for record in records.values())
    if num_episodes == 0:
        raise FormatError(f"{first.folder}: every episode is damaged, so there is nothing to write")
    in_order = [records[index] for index in range(len(copy.groups))]
    _write_manifest(copy, in_order, codebook_VZ, damaged.skipped)
    size_bytes = sum(record.size_bytes for record in in_order)
    say(
        f"wrote {output}: {len(pending)} shards" + (f" ({kept} were there before)" if kept else "")
        + f", {num_episodes} episodes, {size_bytes / 1e6:.1f} MB in all"
    )  # fmt: skip
    return num_episodes


@dataclass(slots=True)
class _Damaged:
    """Episodes that are left out, and how many may be."""

    bound: int
    skipped: dict[str, str] = field(default_factory=dict)
    """What is wrong with each, by its key."""

    def leave_out(self, pick: Pick, error: FormatError) -> str:
        """Note an episode and return the reason, or raise if it is one too many."""
        if len(self.skipped) >= self.bound:
            many = f" ({self.bound} were left out before)" if self.bound else ""
            raise FormatError(
                f"{error}; its episode {pick.key} is one too many{many}: mend the shard, or leave "
                f"out damaged episodes with --skip-bad {self.bound + 1} or more. What was finished "
                "is kept"
            ) from error
        say(f"skipped {pick.key}: {error}")
        # What is written must not depend on where the folder lies.
        reason = str(error).replace(f"{pick.source.shards.folder}/", "")
        self.skipped[pick.key] = reason
        return reason


def _read(picks: Sequence[Pick], damaged: _Damaged, here: dict[str, str]) -> Iterator[TokenEpisode]:
    """Yield the episodes of a shard to be; those left out are put into `here`."""
    for pick in picks:
        try:
            episode = pick.source.read(pick.episode)
        except FormatError as error:
            here[pick.key] = damaged.leave_out(pick, error)
        else:
            yield episode


def _write_manifest(
    copy: ShardCopy,
    records: Sequence[ShardRecord],
    codebook_VZ: npt.NDArray[np.float32],
    skipped: Mapping[str, str],
) -> None:
    """Write the manifest: the first source's, but for episodes, measurements and provenance."""
    first = copy.sources[0].shards
    picks = [pick for group in copy.groups for pick in group if pick.key not in skipped]
    kept = [{pick.episode for pick in picks if pick.source is source} for source in copy.sources]
    write_manifest(
        copy.output,
        records,
        tokenizer=first.tokenizer,
        actions=first.actions,
        codebook_VZ=codebook_VZ,
        fps=first.fps,
        frame_skip=first.frame_skip,
        metrics=combined_metrics(
            [(source.shards, episodes) for source, episodes in zip(copy.sources, kept, strict=True)]
        ),
        source={
            **copy.made_by,
            **({"skipped": dict(skipped)} if skipped else {}),
            "sources": [
                {
                    "manifest": manifest_sha256(source.shards),
                    "num_episodes": len(episodes),
                    "prefix": source.prefix,
                    "metrics": source.shards.metrics,
                    "source": source.shards.source,
                }
                for source, episodes in zip(copy.sources, kept, strict=True)
            ],
        },
    )


def combined_metrics(parts: Sequence[tuple[TokenShards, set[int]]], /) -> dict[str, Any]:
    """Return what the sources' measurements say of some of their episodes together.

    They were taken on the episodes of one split, and hold for a copy that has all of those.
    A PSNR of several sources is that of their pooled squared errors: the frames are of one size,
    so a source weighs as its measured frames do. What cannot be known is None.

    Args:
        parts: each source, and the indices of the episodes that are copied from it.
    """
    names = sorted({name for shards, _ in parts for name in shards.metrics})
    unknown = dict.fromkeys(names)
    weights = [_measured_frames(shards, episodes) for shards, episodes in parts]
    held = [shards.metrics for shards, _ in parts]
    if len({str(metrics.get("split")) for metrics in held}) != 1 or None in weights:
        return unknown
    if len(parts) == 1:
        return dict(held[0])
    frames = [weight for weight in weights if weight is not None]
    known = {"split": held[0].get("split"), "psnr_db": _pooled_psnr(held, frames)}
    return {**unknown, **{name: value for name, value in known.items() if name in names}}


def _measured_frames(shards: TokenShards, episodes: set[int]) -> int | None:
    """Return how many frames were measured, or None if some of them are not copied."""
    split = shards.metrics.get("split")
    measured = shards.split(split) if isinstance(split, str) else range(len(shards.episodes))
    if not measured or not episodes.issuperset(measured):
        return None
    return sum(shards.episodes[index].num_frames for index in measured)


def _pooled_psnr(held: Sequence[Mapping[str, Any]], frames: Sequence[int]) -> float | None:
    """Return the PSNR in dB of several sources' squared errors together."""
    decibels = [db for m in held if _is_decibels(db := m.get("psnr_db"))]
    if len(decibels) < len(held):
        return None
    errors = [10 ** (-db / 10) for db in decibels]
    pooled = sum(e * n for e, n in zip(errors, frames, strict=True)) / sum(frames)
    return -10 * math.log10(pooled)


def _is_decibels(value: object) -> TypeGuard[float]:
    """Whether a stranger's number can be a PSNR."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1000
