"""What a token sees: queries, keys and values of a forward -> what attention found.

    query, key, value (B, N, L, K), layer  ->  seen_BNLK
    those of packed windows (1, N, P, K)   ->  seen_1NPK

One class for each way in which a forward may look around. Among all tokens at once, or factorised,
where layers take turns (even ones look within a frame, odd ones along the frames of a token); in a
window, where all tokens are there, or in a cache, where the tokens of a forward put their own keys
first and then look at what lies there. Meta tokens are seen by all, and see each other alone: they
are the same before every window, so a batch of windows has them once.

A factorised layer within a frame shows the frame before too, where cells are decided one after the
other: a cell could never learn otherwise what became of the cells behind it.

Source: factorised attention, arXiv:2103.15691 (model 3) and Genie (arXiv:2402.15391, section 2.1).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .kv_cache import KVCache

_BLOCK_ROWS = 192
"""Queries of a block, at least: fewer compute fewer scores for nothing, in more kernels."""


class Sight(Protocol):
    """What the tokens of one forward may see."""

    def seen(
        self, layer: int, query_BNLK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor, /
    ) -> Tensor:
        """Return what attention finds for every query, (B, N, L, K)."""


@dataclass(frozen=True, slots=True)
class Window:
    """Windows of tokens that see each other, as a mask says, behind one set of meta tokens."""

    num_meta: int
    length: int
    """Tokens of a window, L."""
    blocks: tuple["Block", ...]
    """Rows of queries one after the other, all L of them."""

    def seen(self, layer: int, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """Return seen_1NPK of P = M + B * L tokens: the meta tokens, then window after window."""
        sinks, (queries, *others) = _unpack(query, key, value, self.num_meta, self.length)
        whole = [
            torch.cat([sink.expand(len(queries), -1, -1, -1), part], dim=2)
            for sink, part in zip(sinks[1:], others, strict=True)
        ]
        parts = queries.split_with_sizes([block.rows for block in self.blocks], dim=2)
        found = []
        for block, rows in zip(self.blocks, parts, strict=True):
            keys, values = (block.seen(part, self.num_meta) for part in whole)
            found.append(_attend(rows, keys, values, block.mask_LM))
        return _pack(sinks, torch.cat(found, dim=2) if len(found) > 1 else found[0])


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that follow each other, and the stretch of the window that any of them sees."""

    rows: int
    first: int
    last: int
    """Tokens of the window: [first, last)."""
    mask_LM: Tensor
    """(rows, M + last - first)."""

    def seen(self, whole: Tensor, num_meta: int, /) -> Tensor:
        """Return those of M + L keys or values that it sees."""
        if self.first == 0:
            return whole[:, :, : num_meta + self.last]
        sinks, others = whole[:, :, :num_meta], whole[:, :, num_meta:]
        return torch.cat([sinks, others[:, :, self.first : self.last]], dim=2)


def blocks_of(mask_LM: Tensor, /, *, num_meta: int) -> tuple[Block, ...]:
    """Return the blocks of a window whose tokens see what a mask (L, M + L) says.

    A token sees nothing behind its own frame, and nothing that the context has left behind: half of
    a long window or more, for which attention with one mask would compute scores and drop them.
    """
    among_LL = mask_LM[:, num_meta:]
    num_blocks = max(1, len(mask_LM) // _BLOCK_ROWS)
    blocks = []
    for rows in torch.arange(len(mask_LM)).tensor_split(num_blocks):
        seen = among_LL[rows].any(0).nonzero()[:, 0]
        first, last = int(seen[0]), int(seen[-1]) + 1
        columns = [mask_LM[rows, :num_meta], among_LL[rows, first:last]]
        blocks.append(Block(len(rows), first, last, torch.cat(columns, dim=1)))
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class FactorisedWindow:
    """The same for windows of f frames of T tokens whose layers take turns."""

    num_meta: int
    space_mask: Tensor
    """(f, 1, T, M + T), or (f, 1, T, M + 2 T) with the frame before in front of the own one."""
    time_mask: Tensor
    """(f, M + f)."""

    def seen(self, layer: int, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """Return seen_1NPK of P = M + B * f * T tokens."""
        frames, tokens = len(self.time_mask), self.space_mask.shape[2]
        sinks, parts = _unpack(query, key, value, self.num_meta, frames * tokens)
        mine = [rearrange(part, "B N (f T) K -> B N f T K", f=frames) for part in parts]
        look = self._along_time if layer % 2 else self._within_frames
        return _pack(sinks, look(mine, sinks[1:]).flatten(2, 3))

    def _within_frames(self, mine: list[Tensor], sinks: list[Tensor]) -> Tensor:
        """Return (B, N, f, T, K) of tokens that see their frame, and maybe the one before."""
        query, key, value = mine
        batch, _, frames, tokens, _ = query.shape
        both = self.space_mask.shape[-1] > self.num_meta + tokens
        seen = []
        for part, sink in zip((key, value), sinks, strict=True):
            own = _fold_frames(part)
            if both:
                before = _fold_frames(pad(part[:, :, :-1], (0, 0, 0, 0, 1, 0)))
                own = torch.cat([before, own], dim=2)
            sinks_ = sink.expand(len(own), -1, -1, -1)
            seen.append(torch.cat([sinks_, own], dim=2))
        mask = self.space_mask.repeat(batch, 1, 1, 1)
        found = _attend(_fold_frames(query), seen[0], seen[1], mask)
        return rearrange(found, "(B f) N T K -> B N f T K", f=frames)

    def _along_time(self, mine: list[Tensor], sinks: list[Tensor]) -> Tensor:
        """Return (B, N, f, T, K) of tokens that see themselves in earlier frames."""
        tokens = mine[0].shape[3]
        queries, keys, values = (rearrange(part, "B N f T K -> (B T) N f K") for part in mine)
        sink_keys, sink_values = (sink.expand(len(queries), -1, -1, -1) for sink in sinks)
        keys = torch.cat([sink_keys, keys], dim=2)
        values = torch.cat([sink_values, values], dim=2)
        found = _attend(queries, keys, values, self.time_mask)
        return rearrange(found, "(B T) N f K -> B N f T K", T=tokens)


@dataclass(frozen=True, slots=True)
class MetaCache:
    """Meta tokens alone, which begin a cache."""

    cache: KVCache

    def seen(self, layer: int, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """Put the keys into the cache; return seen_BNLK."""
        _put(self.cache, layer, slice(0, self.cache.num_meta), key, value)
        return _attend(query, key, value)


@dataclass(frozen=True, slots=True)
class FrameCache:
    """Some tokens of the newest frame, before all that the cache holds."""

    cache: KVCache
    frame: int
    start: int
    stop: int
    """Which tokens of the frame: [start, stop)."""
    mask_LM: Tensor | None
    """What to add to each one's scores of the visible keys; None for nothing."""

    def seen(self, layer: int, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """Put the keys into the cache; return seen_BNLK."""
        cache = self.cache
        _put(cache, layer, cache.places(self.frame, self.start, self.stop), key, value)
        visible = cache.visible(self.frame)
        keys, values = (part[layer].narrow(2, 0, visible) for part in (cache.keys, cache.values))
        return _attend(query, keys, values, self.mask_LM)


@dataclass(frozen=True, slots=True)
class FactorisedFrameCache:
    """The same for layers that take turns."""

    cache: KVCache
    frame: int
    start: int
    stop: int
    own_LT: Tensor
    """Which tokens of their own frame each of them may see."""
    frame_before: bool
    """Whether layers within a frame see the frame before."""

    def seen(self, layer: int, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """Put the keys into the cache; return seen_BNLK."""
        cache = self.cache
        _put(cache, layer, cache.places(self.frame, self.start, self.stop), key, value)
        look = self._along_time if layer % 2 else self._within_frame
        return look(query, cache.keys[layer], cache.values[layer])

    def _within_frame(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return seen_BNLK of tokens that see their frame, and maybe the one before."""
        cache, meta = self.cache, self.cache.num_meta
        places = [slice(0, meta)]
        if self.frame_before and self.frame > cache.first_frame:
            places.append(cache.places(self.frame - 1, 0, cache.frame_tokens))
        places.append(cache.places(self.frame, 0, cache.frame_tokens))
        keys, values = (
            torch.cat([part[:, :, place] for place in places], dim=2) for part in (keys, values)
        )
        others = keys.shape[2] - cache.frame_tokens
        return _attend(query, keys, values, pad(self.own_LT, (others, 0), value=True))

    def _along_time(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return seen_BNLK of tokens that see themselves in earlier frames."""
        cache, meta, tokens = self.cache, self.cache.num_meta, self.stop - self.start
        frames = cache.frames(self.frame)
        each = [rearrange(query, "B N L K -> (B L) N 1 K")]
        for part in (keys, values):
            ring = rearrange(part[:, :, meta:], "B N (f T) K -> B N f T K", T=cache.frame_tokens)
            mine = rearrange(
                ring[:, :, :frames, self.start : self.stop], "B N f L K -> (B L) N f K"
            )
            sinks = repeat(part[:, :, :meta], "B N M K -> (B L) N M K", L=tokens)
            each.append(torch.cat([sinks, mine], dim=2))
        return rearrange(_attend(*each), "(B L) N 1 K -> B N L K", L=tokens)


@dataclass(frozen=True, slots=True)
class Passing:
    """Some tokens of the newest frame that see as another sight says, and leave no trace.

    Their keys take the places of those that the cache has for them, and then give them back.
    """

    sight: FrameCache | FactorisedFrameCache

    def seen(
        self, layer: int, query_BNLK: Tensor, key_BNLK: Tensor, value_BNLK: Tensor, /
    ) -> Tensor:
        """Return seen_BNLK; the cache is as it was."""
        sight, cache = self.sight, self.sight.cache
        places = cache.places(sight.frame, sight.start, sight.stop)
        kept = [part[layer, :, :, places].clone() for part in (cache.keys, cache.values)]
        found_BNLK = sight.seen(layer, query_BNLK, key_BNLK, value_BNLK)
        _put(cache, layer, places, *kept)
        return found_BNLK


def _unpack(
    query: Tensor, key: Tensor, value: Tensor, num_meta: int, length: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return query, key, value of the meta tokens, (1, N, M, K), and of windows, (B, N, L, K)."""
    sinks, windows = [], []
    for part in (query, key, value):
        # Split and not sliced twice: gradients of slices are filled up with zeros and added.
        sink, others = part.split_with_sizes([num_meta, part.shape[2] - num_meta], dim=2)
        sinks.append(sink)
        windows.append(rearrange(others, "1 N (B L) K -> B N L K", L=length))
    return sinks, windows


def _pack(sinks: list[Tensor], found_BNLK: Tensor) -> Tensor:
    """Return (1, N, M + B * L, K): what the meta tokens find among themselves comes first."""
    packed = rearrange(found_BNLK, "B N L K -> 1 N (B L) K")
    if sinks[0].shape[2] == 0:
        return packed
    return torch.cat([_attend(*sinks), packed], dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(Q K^T / sqrt(K)) V; what a cache has may be of another type than queries."""
    key, value = key.to(query.dtype), value.to(query.dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _fold_frames(part: Tensor) -> Tensor:
    """Return (B f, N, T, K) of (B, N, f, T, K)."""
    return rearrange(part, "B N f T K -> (B f) N T K")


def _put(cache: KVCache, layer: int, places: slice, key: Tensor, value: Tensor) -> None:
    """Write keys and values of some tokens to their places."""
    # Not by assignment to an index, which takes longer than to write a token does.
    for there, part in ((cache.keys, key), (cache.values, value)):
        there[layer].narrow(2, places.start, places.stop - places.start).copy_(part)
