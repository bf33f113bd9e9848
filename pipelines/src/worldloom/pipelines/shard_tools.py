"""Token shards -> other token shards: merged, split or chosen from, with nothing encoded again.

    worldloom shards merge runs/monday runs/tuesday --output runs/both
    worldloom shards split runs/both --output runs/parts --parts 4
    worldloom shards subset runs/both --output runs/few --num-episodes 100

reads folders of token shards, writes others of the same kind (docs/formats.md). Every episode is
checked on the way; its codes and actions have the bytes that they had. What is picked is decided,
and refused, here; how it is written is in shard_copy.py.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from worldloom.common import (
    ConfigError,
    EpisodeRecord,
    FormatError,
    MismatchError,
    TokenShards,
    check_key,
    file_sha256,
    numpy_stream,
    read_limited,
    say,
)

from .checks import require_at_least
from .shard_copy import Pick, ShardCopy, Source, regroup, write_copy
from .shard_plan import keep_plan

_SHOWN = 5
"""Names in an error: enough to look one up, few enough to read."""
_MAX_KEYS_BYTES = 1 << 30
_ONLY_OF = {
    "prefix": "merge", "parts": "split", "by_split": "split", "split": "subset", "keys": "subset",
    "num_episodes": "subset",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsConfig:
    """Merge, split or choose from token shards, encoding nothing again; a stopped run continues.

    worldloom shards merge runs/monday/shards runs/tuesday/shards --output runs/both

    worldloom shards split runs/both --output runs/parts --parts 4

    worldloom shards subset runs/both --output runs/few --num-episodes 100
    """

    action: Positional[Literal["merge", "split", "subset"]]
    """What to do: all episodes of several folders into one; those of one folder into several; some
    of those of one folder into another."""
    folders: Positional[tuple[Path, ...]]
    """Folders of token shards: two or more to merge, one to split or to choose from."""
    output: Path
    """Folder to write; of `split`, the folder of the parts."""
    prefix: tuple[str, ...] = ()
    """merge: what to put before the keys of each folder, in their order, where keys collide."""
    parts: int = 0
    """split: so many folders part-000, part-001 ..., each of whole shards, about equally many
    episodes in each."""
    by_split: bool = False
    """split: the folders train and validation, by the split of the episodes."""
    split: Annotated[Literal["train", "validation"] | None, arg(metavar="{train,validation}")] = (
        None
    )
    """subset: episodes of this split."""
    keys: Annotated[Path | None, arg(metavar="PATH")] = None
    """subset: episodes whose keys stand in this text file, one a line."""
    num_episodes: int = 0
    """subset: so many episodes, drawn at random; 0 takes all."""
    seed: int = 0
    """subset: of that draw; the same seed draws the same episodes."""
    shard_episodes: int = 0
    """Episodes per shard; 0 keeps the shards as they are cut (subset: as many as the largest
    has)."""
    skip_bad: int = 0
    """Damaged episodes to leave out at most, of each folder written; each is named and counted. Of
    a shard whose hash is another, all are damaged."""

    def __post_init__(self) -> None:
        """Refuse flags that do not belong together."""
        require_at_least(0, self, "parts", "num_episodes", "shard_episodes", "seed", "skip_bad")
        for name, action in _ONLY_OF.items():
            if getattr(self, name) and self.action != action:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is a flag of `shards {action}`, not of {self.action}")
        wanted = "two or more folders" if self.action == "merge" else "one folder"
        if (len(self.folders) < 2) if self.action == "merge" else (len(self.folders) != 1):
            raise ConfigError(f"shards {self.action} takes {wanted}, got {len(self.folders)}")
        if self.prefix and len(self.prefix) != len(self.folders):
            raise ConfigError(
                f"--prefix takes one for each of the {len(self.folders)} folders, in their order, "
                f"got {len(self.prefix)}; '' leaves the keys of a folder as they are"
            )
        if self.action == "split" and (self.parts > 0) == self.by_split:
            raise ConfigError("shards split takes either --parts N or --by-split")
        if self.output.resolve() in [folder.resolve() for folder in self.folders]:
            raise ConfigError(f"{self.output}: is read from; choose another --output")


def shards(config: ShardsConfig) -> Path:
    """Write the folder, or the folders, that were asked for; return --output."""
    prefixes = config.prefix or ("",) * len(config.folders)
    sources = [
        # Shards that are missing or cut short are found when their turn comes.
        Source(TokenShards(folder, tars_elsewhere=config.skip_bad > 0), prefix)
        for folder, prefix in zip(config.folders, prefixes, strict=True)
    ]
    copies = {"merge": _merge, "split": _split, "subset": _subset}[config.action](config, sources)
    if not copies or not all(copy.groups for copy in copies):
        raise FormatError(
            f"{config.folders[0]}: has no such episodes, so there is nothing to write"
        )
    if config.action == "split":
        keep_plan(config.output, {**_made_by(config), "parts": [c.output.name for c in copies]})
    for copy in copies:
        write_copy(copy, skip_bad=config.skip_bad)
    say(f"next: {shlex.join(['worldloom', 'info', str(copies[0].output), '--verify'])}")
    return config.output


def _made_by(config: ShardsConfig, **settings: Any) -> dict[str, Any]:
    return {"made_by": f"worldloom shards {config.action}", **settings}


def _merge(config: ShardsConfig, sources: Sequence[Source]) -> list[ShardCopy]:
    """Return the copy that has every episode of every source, in their order."""
    first, *others = sources
    for other in others:
        _require_same(first.shards, other.shards)
    picks = [pick for source in sources for pick in _all(source)]
    _refuse_collisions(picks)
    return [
        ShardCopy(
            output=config.output,
            sources=sources,
            groups=regroup(picks, config.shard_episodes),
            made_by=_made_by(
                config, prefix=list(config.prefix), shard_episodes=config.shard_episodes
            ),
        )
    ]


def _split(config: ShardsConfig, sources: Sequence[Source]) -> list[ShardCopy]:
    """Return the copies that together have every episode of the source once."""
    picks = list(_all(sources[0]))
    parts: dict[str, Sequence[Sequence[Pick]]]
    if config.by_split:
        by_name: dict[str, list[Pick]] = {}
        for pick in picks:
            by_name.setdefault(_row(pick).split, []).append(pick)
        parts = {
            name: regroup(by_name[name], config.shard_episodes)
            for name in ("train", "validation")
            if name in by_name
        }
    else:
        groups = regroup(picks, config.shard_episodes)
        if len(groups) < config.parts:
            raise ConfigError(
                f"--parts {config.parts}: {config.folders[0]} has {len(groups)} shards, and a part "
                "has whole ones; pass --shard-episodes with fewer episodes, or fewer parts"
            )
        parts = {
            f"part-{number:03d}": part for number, part in enumerate(_deal(groups, config.parts))
        }
    return [
        ShardCopy(
            output=config.output / name,
            sources=sources,
            groups=groups,
            made_by=_made_by(
                config, part=name, num_parts=len(parts), shard_episodes=config.shard_episodes
            ),
        )
        for name, groups in parts.items()
    ]


def _subset(config: ShardsConfig, sources: Sequence[Source]) -> list[ShardCopy]:
    """Return the copy that has some of the source's episodes, in their order."""
    if not (config.split or config.keys or config.num_episodes or config.shard_episodes):
        raise ConfigError(
            "shards subset: say which episodes with --split, --keys or --num-episodes, or with "
            "--shard-episodes how to cut all of them anew"
        )
    source = sources[0]
    picks = [pick for pick in _all(source) if config.split in (None, _row(pick).split)]
    if config.keys is not None:
        picks = _listed(picks, config)
    if config.num_episodes > len(picks):
        raise ConfigError(
            f"--num-episodes {config.num_episodes}: there are {len(picks)} to draw from in "
            f"{config.folders[0]}"
        )
    if config.num_episodes:
        rng = numpy_stream(config.seed, "shards", "subset")
        drawn = rng.choice(len(picks), config.num_episodes, replace=False)
        picks = [picks[index] for index in sorted(drawn)]
    largest = max((file.num_episodes for file in source.shards.files), default=1)
    return [
        ShardCopy(
            output=config.output,
            sources=sources,
            groups=regroup(picks, config.shard_episodes or largest),
            made_by=_made_by(
                config,
                split=config.split,
                keys=None if config.keys is None else file_sha256(config.keys),
                drawn=config.num_episodes,
                seed=config.seed,
                shard_episodes=config.shard_episodes,
            ),
        )
    ]


def _all(source: Source) -> Iterator[Pick]:
    """Yield every episode, shard by shard, in the order of their bytes."""
    for shard in range(len(source.shards.files)):
        yield from (Pick(source, episode) for episode in source.shards.in_shard(shard))


def _row(pick: Pick) -> EpisodeRecord:
    return pick.source.shards.episodes[pick.episode]


def _deal(groups: Sequence[list[Pick]], parts: int) -> Iterator[Sequence[list[Pick]]]:
    """Yield so many runs of groups, cut where the episodes before come nearest to their share."""
    ends = list(accumulate(map(len, groups)))
    cuts = [0]
    for part in range(1, parts):
        free = range(cuts[-1] + 1, len(groups) - (parts - part) + 1)
        cuts.append(min(free, key=lambda cut: abs(ends[cut - 1] * parts - ends[-1] * part)))
    for start, stop in pairwise([*cuts, len(groups)]):
        yield groups[start:stop]


def _listed(picks: Sequence[Pick], config: ShardsConfig) -> list[Pick]:
    """Return the picks whose keys stand in the file."""
    assert config.keys is not None
    content = read_limited(config.keys, what="a list of keys", limit_bytes=_MAX_KEYS_BYTES)
    lines = content.decode("utf-8", "backslashreplace").splitlines()
    wanted = {line.strip(): number for number, line in enumerate(lines, 1) if line.strip()}
    missing = sorted(wanted.keys() - {pick.key for pick in picks}, key=lambda key: wanted[key])
    if missing:
        which = "" if config.split is None else f"{config.split} "
        raise FormatError(
            f"{config.keys}: line {wanted[missing[0]]}: {config.folders[0]} has no {which}episode "
            f"{_shortly(missing)}; it is a list of keys, one a line"
        )
    return [pick for pick in picks if pick.key in wanted]


def _require_same(first: TokenShards, other: TokenShards) -> None:
    """Refuse shards whose codes, actions or time mean something else."""
    mine, theirs = _agreed(first), _agreed(other)
    differ = [name for name in mine if mine[name] != theirs[name]]
    if differ:
        raise MismatchError(
            f"{other.folder}: does not belong with {first.folder}, in one folder a code or an "
            "action would mean two things; they differ in "
            + ", ".join(f"{n} ({theirs[n]!r:.40} against {mine[n]!r:.40})" for n in differ)
        )


def _agreed(shards: TokenShards) -> dict[str, Any]:
    """Return all that one manifest says once for every episode, by name."""
    return {
        **_flat("tokenizer", shards.tokenizer.to_dict()),
        **_flat("actions", shards.actions.to_dict()),
        "fps": shards.fps,
        "frame_skip": shards.frame_skip,
        "codebook": shards.manifest["codebook"]["sha256"],
    }


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Return the leaves of nested objects, named a.b."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(f"{name}.{key}", inner).items()}


def _refuse_collisions(picks: Sequence[Pick]) -> None:
    """Refuse keys that would stand twice, or that a prefix makes too long."""
    where: dict[str, list[Path]] = {}
    for pick in picks:
        folder = pick.source.shards.folder
        where.setdefault(check_key(pick.key, where=f"{folder}, after --prefix"), []).append(folder)
    twice = [key for key, folders in where.items() if len(folders) > 1]
    if twice:
        folders = ", ".join(map(str, where[twice[0]]))
        raise MismatchError(
            f"{folders}: each has an episode {_shortly(twice)}, and in one folder a key names one; "
            "give each folder's keys a --prefix"
        )


def _shortly(names: Sequence[str]) -> str:
    """Return the first few of some names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"{name:.100}" for name in names[:_SHOWN]) + more
