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
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.common import (
    ConfigError,
    Episodes,
    FormatError,
    MismatchError,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    describe_difference,
    finished_shard,
    is_leftover,
    progress,
    read_json,
    remove_leftovers,
    say,
    write_json,
    write_manifest,
    write_shard,
)

from .checks import require_at_least

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
        require_at_least(1, self, "shard_episodes", "batch_episodes")


def tokenize(config: TokenizeConfig) -> Path:
    """Encode every episode; return the folder of shards."""
    episodes = Episodes(config.episodes)
    # Here and not above: `worldloom tokenize --help` must not wait for torch.
    from worldloom.tokenizer import load_tokenizer

    from .devices import choose_device
    from .encoding import batches

    tokenizer = load_tokenizer(config.tokenizer, device=choose_device(config.device))
    _check_frames(config, episodes, tokenizer.spec)
    plan = _keep_plan(config, episodes, tokenizer.spec)
    if _is_finished(config.output):
        say(f"{config.output}: finished before, nothing to do")
        return config.output
    remove_leftovers(config.output)
    units = list(batches(episodes.keys, config.shard_episodes))
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
    metrics = _measure(tokenizer, episodes, config.batch_episodes)
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
    from .encoding import require_size

    size = (episodes.spec.height, episodes.spec.width)
    require_size(size, spec, where=config.episodes, tokenizer=config.tokenizer)
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
    strangers = [p.name for p in config.output.glob("*") if not is_leftover(p.name)]
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


def _encode(
    tokenizer: "VideoTokenizer", episodes: Episodes, keys: Sequence[str], batch_episodes: int
) -> Iterator[TokenEpisode]:
    """Yield the episodes of one shard, encoded, in the order of their keys."""
    from .encoding import EpisodeFrames, encode_videos

    lengths = _lengths(episodes, keys)
    videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in keys]
    encoded = encode_videos(videos, lengths, tokenizer, batch=batch_episodes)
    dtype = tokenizer.spec.codes.dtype
    codes = {
        key: codes_thw.numpy().astype(dtype) for key, codes_thw in zip(keys, encoded, strict=True)
    }
    for key, num_frames in zip(keys, lengths, strict=True):
        with episodes.open(key) as episode:
            where = str(episodes.folder / f"{key}.npz")
            yield TokenEpisode(
                key=key,
                codes_thw=codes.pop(key),
                slots_TA=episodes.spec.actions.encode(episode.actions, where=where),
                num_frames=num_frames,
                split=episodes.split_of(key),
                metadata=episode.metadata,
            )


def _lengths(episodes: Episodes, keys: Sequence[str]) -> list[int]:
    """Return how many frames each episode has."""
    lengths = []
    for key in keys:
        with episodes.open(key) as episode:
            lengths.append(episode.num_frames)
    return lengths


def _measure(
    tokenizer: "VideoTokenizer", episodes: Episodes, batch_episodes: int
) -> dict[str, float | str]:
    """Return the reconstruction quality on held-out episodes (if any are), for the manifest."""
    from .encoding import EpisodeFrames, clip_psnr, reconstructed_clips

    keys = episodes.split("validation")
    split = "validation" if keys else "train"
    keys = keys or episodes.keys
    videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in keys]
    clips = reconstructed_clips(videos, _lengths(episodes, keys), tokenizer, batch=batch_episodes)
    with closing(clips):
        return {**clip_psnr(clips), "split": split}


def _say_what_was_written(
    config: TokenizeConfig, episodes: int, shards: int, kept: int, metrics: dict[str, float | str]
) -> None:
    measured = (
        "held-out episodes"
        if metrics["split"] == "validation"
        else "training episodes (none is held out)"
    )
    size_bytes = sum(path.stat().st_size for path in config.output.glob("shard-*.tar"))
    say(
        f"wrote {config.output}: {shards - kept} shards"
        + (f" ({kept} were there before)" if kept else "")
        + f", {episodes} episodes, {size_bytes / 1e6:.1f} MB in all; reconstruction on {measured} "
        f"{metrics['psnr_db']:.1f} dB, {metrics['moving_psnr_db']:.1f} dB on what moves"
    )
    dynamics = config.output.parent / "dynamics"
    words = ["worldloom", "train-dynamics", "--shards", str(config.output), "--tokenizer",
             str(config.tokenizer), "--output", str(dynamics)]  # fmt: skip
    say(f"next: {shlex.join(words)}")
