"""Folders of episodes and of token shards -> their descriptions, for `worldloom info`.

    EPISODES  ->  describe_episodes  ->  {"num_frames": ..., "actions": ..., ...}
    SHARDS    ->  describe_shards    ->  {"num_tokens": ..., "code_usage": ..., ...}

Of a large corpus the codes and actions of a sample are counted, always the same one, and
"counted_fraction" says how much of it that is: the time is bounded, whatever the corpus.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from worldloom.common import ActionSpec, Episodes, SlotArray, TokenShards

_COUNTED_CODES = 50_000_000
"""Codes read to count their usage: a second's work, and plenty for a vocabulary of 2**16."""
_COUNTED_SLOTS = 20_000_000
_COUNTED_READS = 50_000
"""Stretches read of either: each costs tens of microseconds, and may open a file."""
_BLOCK_CODES = 1 << 20
"""Codes of a stretch at most: a long episode is counted, and sampled, in pieces."""
_RANKS = 32
"""Bars of the histogram of codes, at most."""
_MOST_FREQUENT = 5


def describe_episodes(folder: Path, verify: bool, /) -> dict[str, Any]:
    """Describe a folder of episodes; with `verify`, read every frame."""
    episodes = Episodes(folder)
    spec = episodes.spec
    lengths, returns, slots = [], [], []
    labelled = 0
    for key in episodes.keys:
        with episodes.open(key) as episode:
            lengths.append(episode.num_frames)
            if (slots_TA := episode.slots_TA) is not None:
                labelled += spec.actions.kind != "none"
                slots.append(slots_TA)
            if (rewards := episode.rewards) is not None:
                returns.append(float(rewards.sum()))
            if verify:
                for _ in episode.pieces():
                    pass
    by_key = dict(zip(episodes.keys, lengths, strict=True))
    return {
        "num_episodes": len(lengths),
        "labelled_episodes": labelled,
        "num_frames": sum(lengths),
        "seconds": sum(lengths) / spec.fps,
        "height": spec.height,
        "width": spec.width,
        "fps": spec.fps,
        "frame_skip": spec.frame_skip,
        "episode_frames": _spread(lengths),
        "episode_return": _spread(returns),
        "splits": _splits((name, by_key[key]) for name in _SPLITS for key in episodes.split(name)),
        "actions": _actions(spec.actions, slots),
        "source": dict(spec.source),
        "verified": verify,
    }


def describe_shards(folder: Path, verify: bool, /) -> dict[str, Any]:
    """Describe token shards; with `verify`, hash every byte and read every array."""
    shards = TokenShards(folder)
    if verify:
        shards.verify()
    else:
        shards.codebook_VZ()  # its file is as large as the vocabulary that the manifest claims
    codes, rows = shards.codes, shards.episodes
    latent_frames = sum(row.latent_frames for row in rows)
    num_codes = latent_frames * codes.cells * codes.num_levels
    num_slots = sum(row.num_steps for row in rows) * shards.actions.num_slots
    labelled = sum(row.labelled for row in rows) if shards.actions.kind != "none" else 0
    shard_bytes = sum(file["size_bytes"] for file in shards.manifest["shards"])
    payload_bytes = num_codes * np.dtype(codes.dtype).itemsize
    payload_bytes += num_slots * np.dtype(shards.actions.slot_dtype).itemsize
    return {
        "num_shards": len(shards.manifest["shards"]),
        "num_episodes": len(rows),
        "labelled_episodes": labelled,
        "num_frames": sum(row.num_frames for row in rows),
        "latent_frames": latent_frames,
        "num_codes": num_codes,
        "num_action_slots": num_slots,
        "num_tokens": num_codes + num_slots,
        "all_shards_bytes": shard_bytes,
        "bytes_per_token": shard_bytes / max(1, num_codes + num_slots),
        "overhead_fraction": (shard_bytes - payload_bytes) / max(1, shard_bytes),
        "fps": shards.fps,
        "frame_skip": shards.frame_skip,
        "episode_frames": _spread([row.num_frames for row in rows]),
        "splits": _splits((row.split, row.num_frames) for row in rows),
        "fingerprint": shards.tokenizer.fingerprint,
        "tokenizer": shards.tokenizer.to_dict(),
        "code_usage": _code_usage(shards, num_codes),
        "actions": _shard_actions(shards, num_slots),
        "metrics": shards.metrics,
        "skipped": dict(_skipped(shards.source)),
        "source": shards.source,
        "verified": verify,
    }


def _skipped(source: object) -> Iterator[tuple[str, str]]:
    """Yield what was left out, and why, wherever a source or a source of it says so."""
    if isinstance(source, list):
        for part in source:
            yield from _skipped(part)
    if isinstance(source, Mapping):
        for name, part in source.items():
            if name == "skipped" and isinstance(part, Mapping):
                yield from ((key, str(reason)) for key, reason in part.items())
            else:
                yield from _skipped(part)


def _shard_actions(shards: TokenShards, num_slots: int) -> dict[str, Any]:
    """Count the actions of every episode, or of every n-th where there are very many."""
    num_episodes = len(shards.episodes)
    stride = _stride((num_slots, _COUNTED_SLOTS), (num_episodes, _COUNTED_READS))
    counted = range(0, num_episodes, stride)
    about = _actions(shards.actions, map(shards.slots_TA, counted))
    steps = sum(row.num_steps for row in shards.episodes)
    return {**about, "counted_fraction": about["steps"] / steps if steps else 1.0}


def _stride(*amounts: tuple[int, int]) -> int:
    """Return the least n for which every n-th is within each limit."""
    return max(1, *(-(-there // limit) for there, limit in amounts))


_SPLITS = ("train", "validation")


def _splits(rows: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Count episodes and frames of every split."""
    splits = {name: {"num_episodes": 0, "num_frames": 0} for name in _SPLITS}
    for name, num_frames in rows:
        splits[name]["num_episodes"] += 1
        splits[name]["num_frames"] += num_frames
    return splits


def _spread(values: list[Any]) -> dict[str, float] | None:
    """Return the least, middle and greatest of some numbers."""
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def _actions(spec: ActionSpec, slots: Iterable[SlotArray]) -> dict[str, Any]:
    """Return the action spec and how often every action was chosen.

    `histogram` maps a choice or a key to its number of steps; for several axes, an axis to such
    numbers, one a value or bin from the lowest. Keys that are held together count each.
    """
    counts = [np.zeros(size, np.int64) for size in spec.sizes]
    none = steps = 0
    for slots_TA in slots:
        steps += len(slots_TA)
        for slot, count in enumerate(counts):
            count += np.bincount(slots_TA[:, slot], minlength=len(count))
        none += int((slots_TA == 0).all(1).sum()) if spec.kind == "keys" else 0
    histogram: dict[str, Any] = {}
    if spec.kind == "discrete":
        histogram = dict(zip(spec.names, counts[0].tolist(), strict=True))
    elif spec.kind == "keys":
        pressed = np.sum(counts, axis=0)[1:]
        histogram = {"none": none, **dict(zip(spec.names, pressed.tolist(), strict=True))}
    elif spec.kind != "none":
        histogram = {name: count.tolist() for name, count in zip(spec.names, counts, strict=True)}
    return {"kind": spec.kind, "names": list(spec.names), "steps": steps, "histogram": histogram}


def _code_usage(shards: TokenShards, num_codes: int) -> dict[str, Any]:
    """Count codes, and how often a cell's changes from one latent frame to the next.

    Every level of a residual tokenizer has a codebook of its own, so each is counted by itself, and
    "levels" has the numbers of each. Those above are of all: the codes used of all codebooks, the
    geometric mean of the perplexities, and the cells that change in any level.
    """
    depth, vocab_size = shards.codes.num_levels, shards.codes.vocab_size
    counts_QV = np.zeros((depth, vocab_size), np.int64)
    changed_Q = np.zeros(depth, np.int64)
    changed = compared = 0
    for codes_tSQ, first in _counted_blocks(shards, num_codes):
        for level in range(depth):
            codes_N = codes_tSQ[first:, :, level].reshape(-1)
            counts_QV[level] += np.bincount(codes_N, minlength=vocab_size)
        differ_tSQ = codes_tSQ[1:] != codes_tSQ[:-1]
        changed_Q += differ_tSQ.sum((0, 1))
        changed += int(differ_tSQ.any(-1).sum())
        compared += differ_tSQ[..., 0].size
    entropies = [_entropy(counts_V) for counts_V in counts_QV]
    ranked_QV = -np.sort(-counts_QV, axis=1)
    about: dict[str, Any] = {
        "vocab_size": vocab_size,
        "codes_used": int((counts_QV > 0).sum()),
        "codes_used_fraction": float((counts_QV > 0).mean()),
        "perplexity": math.exp(sum(entropies) / depth),
        "code_change_rate": _share(changed, compared),
        "by_rank": _by_rank(ranked_QV.sum(0)),
        "counted_fraction": _share(int(counts_QV.sum()), num_codes) or 1.0,
    }
    if depth == 1:
        frequent = np.argsort(-counts_QV[0], kind="stable")[:_MOST_FREQUENT].tolist()
        total = int(counts_QV.sum())
        about["most_frequent"] = {
            str(code): int(counts_QV[0, code]) / total for code in frequent if counts_QV[0, code]
        }
        return about
    levels = {
        "codes_used": (counts_QV > 0).sum(1).tolist(),
        "codes_used_fraction": (counts_QV > 0).mean(1).tolist(),
        "perplexity": [math.exp(entropy) for entropy in entropies],
        "code_change_rate": [_share(number, compared) for number in changed_Q.tolist()],
    }
    return {**about, "levels": levels}


def _counted_blocks(
    shards: TokenShards, num_codes: int
) -> Iterator[tuple[npt.NDArray[np.unsignedinteger[Any]], int]]:
    """Yield codes_tSQ of all stretches, or of every n-th, and the first frame to count in each.

    A stretch that does not begin its episode has the frame before it in front, to compare with.
    """
    per_frame = shards.codes.cells * shards.codes.num_levels
    frames = max(1, _BLOCK_CODES // per_frame)
    rows = shards.episodes
    num_blocks = sum(-(-row.latent_frames // frames) for row in rows)
    stride = _stride((num_codes, _COUNTED_CODES), (num_blocks, _COUNTED_READS))
    blocks = (
        (episode, start)
        for episode, row in enumerate(rows)
        for start in range(0, row.latent_frames, frames)
    )
    for episode, start in islice(blocks, 0, None, stride):
        first = min(1, start)
        part_thw = shards.codes_thw(episode, start - first, start + frames)
        yield part_thw.reshape(len(part_thw), -1, shards.codes.num_levels), first


def _by_rank(ranked_V: npt.NDArray[np.int64]) -> list[float]:
    """Return the share of the codes in equal runs of the codebook, the most frequent first."""
    starts = range(0, len(ranked_V), -(-len(ranked_V) // _RANKS))
    sums = np.add.reduceat(ranked_V, starts)
    return [float(share) for share in sums / max(1, ranked_V.sum())]


def _share(part: int, whole: int) -> float | None:
    """Return a share, or None of nothing."""
    return part / whole if whole else None


def _entropy(counts_V: npt.NDArray[np.int64]) -> float:
    """Return the entropy, in nats, of how often each code occurs."""
    share: npt.NDArray[np.float64] = counts_V[counts_V > 0] / max(1, counts_V.sum())
    return float(-(share * np.log(share)).sum())
