"""Several folders of token shards -> windows of all of them, drawn by weight.

    Windows of A, Windows of B, weights 3 : 1  ->  batch i: about three rows of four from A

Which data set a row comes from, and which window of it, is a pure function of (seed, i, row):
resuming needs i, processes take their rows of the same batch, and no data set is ever through
before the others, however much larger these are. All must speak the same codes and actions; only
video without actions goes together with any one kind of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from worldloom.common import (
    ConfigError,
    MismatchError,
    TokenShards,
    numpy_stream,
)

from .spec import DynamicsSpec
from .windows import StoredWindows, WindowBatch, Windows, rows_of


class Mixture:
    """Windows of one split of several folders of token shards."""

    def __init__(self, parts: Sequence[Windows], weights: Sequence[float], /) -> None:
        """Mix data sets that `check_alike` has passed.

        Args:
            parts: the windows of each.
            weights: how often each is drawn, in any unit: see `weights_of`.
        """
        self.parts = list(parts)
        self.latent_frames = sum(part.latent_frames for part in parts)
        """Latent frames in all."""
        shares = np.asarray(weights, np.float64) / math.fsum(weights)
        # The last bound is left out: no draw can then fall behind it by rounding.
        self._bounds = np.cumsum(shares)[:-1]

    def __len__(self) -> int:
        """Number of different windows."""
        return sum(len(part) for part in self.parts)

    def batch(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> WindowBatch:
        """Return this rank's rows of the index-th batch of `size` windows.

        Row i of what is returned is row rank + i * num_ranks of the whole batch.

        Raises:
            ValueError: if the batch cannot be dealt out evenly.
            FormatError: if a shard is damaged.
        """
        return self.stored(index, size=size, seed=seed, rank=rank, num_ranks=num_ranks).to("cpu")

    def stored(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> StoredWindows:
        """Return what `batch` returns, with codes in the type of the shards."""
        rows = rows_of(rank, num_ranks, size=size)
        chosen_B, numbers_B = (drawn[rows] for drawn in self._draw(index, size=size, seed=seed))
        first = self.parts[0]
        stored = StoredWindows(
            len(chosen_B),
            codes=first.shards.codes,
            actions=first.actions,
            window_frames=first.window_frames,
        )
        for which, part in enumerate(self.parts):
            mine = np.flatnonzero(chosen_B == which)
            part.put(stored, mine, numbers_B[mine])
        return stored

    def origins(self, index: int, /, *, size: int, seed: int) -> list[tuple[str, int]]:
        """Return (FOLDER: key of the episode, first latent frame) of every window of a batch."""
        chosen_B, numbers_B = self._draw(index, size=size, seed=seed)
        named = []
        for which, number in zip(chosen_B.tolist(), numbers_B, strict=True):
            part = self.parts[which]
            key, first = part.places(number[None])[0]
            named.append((f"{part.shards.folder}: {key}", first))
        return named

    def _draw(
        self, index: int, *, size: int, seed: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return data set and window of every row of a whole batch."""
        places_B = numpy_stream(seed, "mixture", index).random(size)
        chosen_B = np.searchsorted(self._bounds, places_B, side="right")
        # Every data set draws for all rows, so that a row's window depends on no other row.
        numbers_DB = np.stack(
            [
                part.draw(index, size=size, seed=seed, purpose=(which,))
                for which, part in enumerate(self.parts)
            ]
        )
        return chosen_B, numbers_DB[chosen_B, np.arange(size)]


def weights_of(
    shards: Sequence[TokenShards], weights: Sequence[float] | None, /
) -> tuple[float, ...]:
    """Return the weight of each data set: those asked for, else latent frames to learn from.

    Raises:
        ConfigError: if there are not as many as data sets, or one is not positive.
    """
    if weights is None:
        return tuple(
            float(sum(one.episodes[i].latent_frames for i in one.split("train"))) for one in shards
        )
    if len(weights) != len(shards):
        raise ConfigError(
            f"weights: {len(weights)} for {len(shards)} folders of shards, must be one each, in "
            "the same order"
        )
    for weight, one in zip(weights, shards, strict=True):
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"weights: {weight} for {one.folder}, must be more than 0; to leave a folder out, "
                "do not name it"
            )
    return tuple(map(float, weights))


def check_alike(shards: Sequence[TokenShards], /) -> None:
    """Refuse data sets of which one model could not learn.

    Video without actions goes together with any one kind of them: its windows have no known action.

    Raises:
        MismatchError: naming what differs, and both folders.
    """
    first = next((one for one in shards if one.actions.kind != "none"), shards[0])
    wanted = DynamicsSpec.of(first).to_dict()
    for other in shards:
        here, there = str(first.folder), str(other.folder)
        first.tokenizer.require(other.tokenizer, here=here, there=there)
        # Of video without actions everything but these must be the same.
        silent = other.actions.kind == "none"
        theirs = DynamicsSpec.of(other)
        found = (replace(theirs, actions=first.actions) if silent else theirs).to_dict()
        if wanted != found:
            raise MismatchError(
                f"{there}: cannot be mixed with {here}, from which it differs in "
                f"{_differences(found, wanted)}; one model speaks one set of actions at one speed. "
                "Record or ingest them alike, or train one model each"
            )
        if other.manifest["codebook"]["sha256"] != first.manifest["codebook"]["sha256"]:
            raise MismatchError(
                f"{there}: has another codebook than {here}, though both name the same tokenizer; "
                "run `worldloom tokenize` again for one of them"
            )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return "fps (30.0 against 20.0), actions.names (... against ...)"."""
    parts = []
    for name, value in wanted.items():
        if found[name] == value:
            continue
        if isinstance(value, Mapping):
            parts += [
                f"{name}.{inner} ({found[name][inner]!r:.60} against {value[inner]!r:.60})"
                for inner in value
                if found[name][inner] != value[inner]
            ]
        else:
            parts.append(f"{name} ({found[name]!r} against {value!r})")
    return ", ".join(parts)
