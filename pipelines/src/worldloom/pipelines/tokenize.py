"""Episodes -> token shards, offline, once; whatever stops it, the next run continues.

    worldloom tokenize --episodes runs/doom/episodes --tokenizer runs/doom/tokenizer/model \
        --output runs/doom/shards

reads EPISODES and a tokenizer's model directory; writes SHARDS/{plan.json, shard-%06d.tar,
shard-%06d.json, codebook.safetensors, manifest.json} (docs/formats.md). The unit of work is a
shard: the plan decides which episodes it holds, and which of them are encoded side by side, before
anything is encoded. So a shard's bytes do not depend on what happened to the others.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from worldloom.common import (
    CodeArray,
    ConfigError,
    Episode,
    Episodes,
    FormatError,
    Frames,
    MismatchError,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    describe_difference,
    finished_shard,
    progress,
    read_json,
    remove_leftovers,
    say,
    write_json,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from worldloom.tokenizer import VideoTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """Turn episodes into token shards, once, offline; a stopped run continues.

    worldloom tokenize --episodes runs/demo/episodes --tokenizer runs/demo/tokenizer/model
    --output runs/demo/shards
    """

    episodes: Path
    """Folder of episodes."""
    tokenizer: Path
    """Model directory of the tokenizer, as `worldloom train-tokenizer` writes it."""
    output: Path
    """Folder for the shards; finished ones are never redone."""
    shard_episodes: int = 64
    """Episodes per shard: what a stopped run loses at most."""
    batch_episodes: int = 16
    """Episodes encoded side by side; more is faster on a GPU and takes more memory."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to do."""
        for name in ("shard_episodes", "batch_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tokenize: {name} {getattr(self, name)} must be at least 1")


def tokenize(config: TokenizeConfig) -> Path:
    """Encode every episode; return the folder of shards."""
    episodes = Episodes(config.episodes)
    # Here and not above: `worldloom tokenize --help` must not wait for torch.
    from worldloom.tokenizer import load_tokenizer

    from .devices import choose_device

    tokenizer = load_tokenizer(config.tokenizer, device=choose_device(config.device))
    _check_frames(config, episodes, tokenizer.spec)
    plan = _keep_plan(config, episodes, tokenizer.spec)
    if _is_finished(config.output):
        say(f"{config.output}: finished before, nothing to do")
        return config.output
    remove_leftovers(config.output)
    units = _split(episodes.keys, config.shard_episodes)
    shards = [finished_shard(config.output, index) for index in range(len(units))]
    pending = [index for index, record in enumerate(shards) if record is None]
    kept = len(units) - len(pending)
    for index in progress(pending, "encoding shards", total=len(units), done=kept):
        shards[index] = write_shard(
            config.output,
            index,
            _encode(tokenizer, episodes, units[index], config.batch_episodes),
            codes=tokenizer.spec.codes,
            actions=episodes.spec.actions,
        )
    metrics = _measure(tokenizer, episodes)
    write_manifest(
        config.output,
        [record for record in shards if record is not None],
        tokenizer=tokenizer.spec,
        actions=episodes.spec.actions,
        codebook_VZ=tokenizer.codebook.cpu().numpy(),
        fps=episodes.spec.fps,
        frame_skip=episodes.spec.frame_skip,
        metrics=metrics,
        source={"episodes": dict(episodes.spec.source), "plan": plan},
    )
    _say_what_was_written(config, len(episodes.keys), len(units), kept, metrics)
    return config.output


def _check_frames(config: TokenizeConfig, episodes: Episodes, spec: TokenizerSpec) -> None:
    """Refuse frames that the tokenizer does not take; speak of those it was not trained on."""
    size = (episodes.spec.height, episodes.spec.width)
    if size != (spec.height, spec.width):
        shapes = (
            f"{config.episodes}: frames are {size[0]}x{size[1]} (height x width), but the "
            f"tokenizer in {config.tokenizer} takes {spec.height}x{spec.width}"
        )
        if spec.resize == "exact":
            raise MismatchError(
                f"{shapes} exactly, because any other size changes the picture; record episodes of "
                "that size, or train a tokenizer on these"
            )
        say(f"{shapes}; they are resized by its rule, {spec.resize}")
    for name in ("fps", "frame_skip"):
        theirs, here = getattr(spec, name), getattr(episodes.spec, name)
        if theirs not in (0, here):  # 0: it does not matter
            say(
                f"{config.episodes}: {name} is {here:g}, the tokenizer was trained at {theirs:g}; "
                "where it looks at motion it may reconstruct worse"
            )


def _keep_plan(config: TokenizeConfig, episodes: Episodes, spec: TokenizerSpec) -> dict[str, Any]:
    """Write the plan, or check that this run's is the one an earlier run began with."""
    plan = {
        "tokenizer": spec.fingerprint,
        "source": episodes.fingerprint(),
        "num_episodes": len(episodes.keys),
        "shard_episodes": config.shard_episodes,
        "batch_episodes": config.batch_episodes,
    }
    path = config.output / "plan.json"
    if path.exists():
        before = read_json(path, what="the plan of a folder of token shards")
        if before != plan:
            raise MismatchError(
                f"{config.output}: was begun with another plan "
                f"({describe_difference(before, plan)}); its shards would not belong together. "
                "Go on with the same one, or choose another --output"
            )
        return plan
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"{config.output}: is a file; --output is a folder")
    # A temporary file may be a plan that was killed while it was written.
    strangers = [p.name for p in config.output.glob("*") if not p.name.startswith("tmp-")]
    if strangers:
        raise ConfigError(
            f"{config.output}: has {', '.join(sorted(strangers)[:3])} but no plan.json, so it is "
            "no folder of token shards; nothing was touched. Choose another --output"
        )
    write_json(path, plan)
    return plan


def _is_finished(folder: Path) -> bool:
    """Whether everything the manifest speaks of is there; asks for sizes, not for every byte."""
    if not (folder / "manifest.json").exists():
        return False
    try:
        TokenShards(folder).codebook_VZ()
    except FormatError as error:
        say(f"{error}; doing that now")
        return False
    return True


def _split(keys: Sequence[str], size: int) -> list[Sequence[str]]:
    """Return the keys in runs of `size`, the last perhaps shorter."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def _encode(
    tokenizer: "VideoTokenizer", episodes: Episodes, keys: Sequence[str], batch_episodes: int
) -> Iterator[TokenEpisode]:
    """Yield the episodes of one shard, encoded, in the order of their keys."""
    lengths: dict[str, int] = {}
    for key in keys:
        with episodes.open(key) as episode:
            lengths[key] = episode.num_frames
    # Those that end before their neighbours are filled up and cut off again, which costs the same
    # as real frames: so side by side go episodes of like length.
    by_length = sorted(keys, key=lambda key: (lengths[key], key))
    spec = tokenizer.spec.codes
    codes: dict[str, CodeArray] = {}
    for batch in _split(by_length, batch_episodes):
        codes_Bthw = _encode_side_by_side(tokenizer, episodes, batch)
        for key, codes_thw in zip(batch, codes_Bthw, strict=True):
            codes[key] = codes_thw[: spec.latent_frames(lengths[key])]
    for key in keys:
        with episodes.open(key) as episode:
            where = str(episodes.folder / f"{key}.npz")
            yield TokenEpisode(
                key=key,
                codes_thw=codes.pop(key),
                slots_TA=episodes.spec.actions.encode(episode.actions, where=where),
                num_frames=lengths[key],
                split=episodes.split_of(key),
                metadata=episode.metadata,
            )


def _encode_side_by_side(
    tokenizer: "VideoTokenizer", episodes: Episodes, keys: Sequence[str]
) -> CodeArray:
    """Return codes_Bthw, one row a key; what lies behind an episode's end means nothing."""
    import torch

    with ExitStack() as files:
        opened = [files.enter_context(episodes.open(key)) for key in keys]
        session = tokenizer.open_encoder()
        parts_Bthw = [
            session.push(torch.from_numpy(frames_BTHWC))
            for frames_BTHWC in _side_by_side(opened, tokenizer.spec)
        ]
        parts_Bthw.append(session.flush())
    # A session may hold frames back, so any part may be empty.
    codes_Bthw = torch.cat([part.cpu() for part in parts_Bthw if part.shape[1]], dim=1)
    return codes_Bthw.numpy().astype(tokenizer.spec.codes.dtype)


def _side_by_side(opened: Sequence[Episode], spec: TokenizerSpec) -> Iterator[Frames]:
    """Yield frames_BTHWC, a piece of every episode at a time, at the tokenizer's size.

    An episode that has ended repeats its last frame.
    """
    streams = [_resized(episode, spec) for episode in opened]
    last: list[Frames] = []
    for pieces in zip_longest(*streams):
        length = max(len(piece) for piece in pieces if piece is not None)
        rows = [last[row] if piece is None else piece for row, piece in enumerate(pieces)]
        filled = [
            np.concatenate([row, np.repeat(row[-1:], length - len(row), axis=0)]) for row in rows
        ]
        yield np.stack(filled)
        last = [row[-1:] for row in rows]


def _resized(episode: Episode, spec: TokenizerSpec) -> Iterator[Frames]:
    """Yield an episode's frames_THWC in pieces, at the tokenizer's size."""
    from worldloom.tokenizer import resize_frames

    for piece in episode.pieces():
        yield resize_frames(piece, height=spec.height, width=spec.width, rule=spec.resize)


def _measure(tokenizer: "VideoTokenizer", episodes: Episodes, *, most: int = 8) -> dict[str, float]:
    """Return the reconstruction quality on held-out episodes, for the manifest."""
    import torch
    from worldloom.tokenizer.metrics import LIMIT_DB, decibels, moving_pixels, squared_error

    keys = (episodes.split("validation") or episodes.keys)[:most]
    errors, moving = [], []
    for key in keys:
        with episodes.open(key) as episode:
            true_BTHWC = torch.from_numpy(next(_side_by_side([episode], tokenizer.spec)))
        codes_Bthw = tokenizer.encode(true_BTHWC)
        decoded_BTHWC = tokenizer.decode(codes_Bthw, num_frames=true_BTHWC.shape[1]).cpu()
        errors.append(squared_error(true_BTHWC, decoded_BTHWC).flatten())
        moving.append(moving_pixels(true_BTHWC).flatten())
    error, moves = torch.cat(errors).double(), torch.cat(moving)
    return {
        "psnr_db": decibels(float(error.mean())),
        "moving_psnr_db": decibels(float(error[moves].mean())) if moves.any() else LIMIT_DB,
    }


def _say_what_was_written(
    config: TokenizeConfig, episodes: int, shards: int, kept: int, metrics: dict[str, float]
) -> None:
    size_bytes = sum(path.stat().st_size for path in config.output.glob("shard-*.tar"))
    say(
        f"wrote {config.output}: {shards - kept} shards"
        + (f" ({kept} were there before)" if kept else "")
        + f", {episodes} episodes, {size_bytes / 1e6:.1f} MB in all; reconstruction on held-out "
        f"episodes {metrics['psnr_db']:.1f} dB, {metrics['moving_psnr_db']:.1f} dB on what moves"
    )
    dynamics = config.output.parent / "dynamics"
    words = ["worldloom", "train-dynamics", "--shards", str(config.output), "--tokenizer",
             str(config.tokenizer), "--output", str(dynamics)]  # fmt: skip
    say(f"next: {shlex.join(words)}")
