"""Episodes -> token shards, offline, once; whatever stops it, the next run continues.

    worldloom tokenize --episodes runs/doom/episodes --tokenizer runs/doom/tokenizer/model \
        --output runs/doom/shards

reads EPISODES and a tokenizer (a model directory, or the name of a class: docs/tokenizers.md);
writes SHARDS/{plan.json, shard-%06d.tar, shard-%06d.json, codebook.safetensors, manifest.json}
(docs/formats.md). The unit of work is a shard: the plan decides which episodes it holds, and which
of them are encoded side by side, before anything is encoded. So a shard's bytes do not depend on
what happened to the others.
"""

import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.common import (
    CodeArray,
    ConfigError,
    Episodes,
    FormatError,
    MismatchError,
    ShardRecord,
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
    tokenizer: str
    """Model directory of the tokenizer, as `worldloom train-tokenizer` writes it; or an installed
    name such as `patch`, or `module:Class`, or `module:Class=FOLDER` (docs/tokenizers.md)."""
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

    tokenizer = load_tokenizer(config.tokenizer, device=choose_device(config.device))
    _check_frames(config, episodes, tokenizer.spec)
    plan = _keep_plan(config, episodes, tokenizer.spec)
    if _is_finished(config.output):
        say(f"{config.output}: finished before, nothing to do")
        return config.output
    shards, kept = encode_shards(
        tokenizer,
        episodes,
        config.output,
        shard_episodes=config.shard_episodes,
        batch_episodes=config.batch_episodes,
    )
    metrics = _measure(tokenizer, episodes, config.batch_episodes)
    write_manifest(
        config.output,
        shards,
        tokenizer=tokenizer.spec,
        actions=episodes.spec.actions,
        codebook_VZ=tokenizer.codebook.cpu().numpy(),
        fps=episodes.spec.fps,
        frame_skip=episodes.spec.frame_skip,
        metrics=metrics,
        source={"episodes": dict(episodes.spec.source), "plan": plan},
    )
    _say_what_was_written(config, len(episodes.keys), len(shards), kept, metrics)
    return config.output


def encode_shards(
    tokenizer: "VideoTokenizer",
    episodes: Episodes,
    output: Path,
    /,
    *,
    shard_episodes: int,
    batch_episodes: int,
) -> tuple[list[ShardRecord], int]:
    """Write the shards that are not there yet; return those of all shards, and how many were.

    Frames are read and resized in one thread and a finished shard is written in another, both
    while the tokenizer works on what is in between.
    """
    from .encoding import batches

    remove_leftovers(output)
    units = list(batches(episodes.keys, shard_episodes))
    before = [finished_shard(output, index) for index in range(len(units))]
    found = {index: record for index, record in enumerate(before) if record is not None}
    kept = len(found)
    pending = [index for index in range(len(units)) if index not in found]
    writes: dict[int, Future[ShardRecord]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as thread:
        for index in progress(pending, "encoding shards", total=len(units), done=kept):
            codes = _encode(tokenizer, episodes, units[index], batch_episodes)
            for write in writes.values():
                write.result()  # one shard waits at most, and an error ends the run
            writes[index] = thread.submit(
                write_shard,
                output,
                index,
                _token_episodes(episodes, codes),
                codes=tokenizer.spec.codes,
                actions=episodes.spec.actions,
            )
    found |= {index: write.result() for index, write in writes.items()}
    return [found[index] for index in range(len(units))], kept


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
) -> dict[str, CodeArray]:
    """Return the codes of the episodes of one shard, by their keys, in order."""
    from .encoding import EpisodeFrames, encode_videos

    videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in keys]
    encoded = encode_videos(videos, _lengths(episodes, keys), tokenizer, batch=batch_episodes)
    dtype = tokenizer.spec.codes.dtype
    return {
        key: codes_thw.numpy().astype(dtype) for key, codes_thw in zip(keys, encoded, strict=True)
    }


def _token_episodes(episodes: Episodes, codes: dict[str, CodeArray]) -> Iterator[TokenEpisode]:
    """Yield the encoded episodes of one shard with what else belongs to them."""
    for key, codes_thw in codes.items():
        with episodes.open(key) as episode:
            where = str(episodes.folder / f"{key}.npz")
            yield TokenEpisode(
                key=key,
                codes_thw=codes_thw,
                slots_TA=episodes.spec.actions.encode(episode.actions, where=where),
                num_frames=episode.num_frames,
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
             config.tokenizer, "--output", str(dynamics)]  # fmt: skip
    say(f"next: {shlex.join(words)}")
