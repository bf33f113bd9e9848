"""Episodes -> token shards, offline, once; whatever stops it, the next run continues.

    worldloom tokenize --episodes runs/doom/episodes --tokenizer runs/doom/tokenizer/model \
        --output runs/doom/shards

reads EPISODES and a tokenizer (a model directory, or the name of a class: docs/tokenizers.md);
writes SHARDS/{plan.json, shard-%06d.tar, shard-%06d.json, codebook.safetensors, manifest.json}
(docs/formats.md). The unit of work is a shard (units.py): the plan decides which episodes it holds,
and which of them are encoded side by side, before anything is encoded. So the same bytes come from

    this process, or several:  --workers 2
    a launcher's ranks:        torchrun --nproc_per_node 2 -m worldloom.pipelines tokenize ...
                               sbatch --array=0-9 (and `srun`), or --rank 0 --world 2 by hand
    a Ray cluster:             --engine ray --ray-address auto

Ranks do not talk: each does its own shards, and who finds the marker of every shard writes the
manifest.
"""

import shlex
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg
from worldloom.common import (
    ConfigError,
    Episodes,
    TokenizerSpec,
    progress,
    say,
)

from .checks import require_at_least
from .ranks import Share, find_share, num_cores
from .shard_plan import is_finished, keep_plan, read_plan, require_plan

if TYPE_CHECKING:
    from worldloom.tokenizer import VideoTokenizer

    from .tokenize_dry_run import TokenizeDryRun
    from .tokenize_merge import Merged
    from .units import TokenizeJob, UnitReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    r"""Turn episodes into token shards, once, offline; a stopped run continues.

    worldloom tokenize --episodes runs/demo/episodes \
            --tokenizer runs/demo/tokenizer/model --output runs/demo/shards
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
    workers: int = 0
    """Processes that encode, each with one thread on a CPU; 0: one a core, or one a GPU, and never
    more than there are shards to do."""
    skip_bad: int = 0
    """Damaged episodes to leave out at most, each named and counted; the next one stops the run."""
    engine: Literal["auto", "processes", "ray"] = "auto"
    """Who does the work: processes of this machine, or actors of a Ray cluster (needs
    `pip install 'worldloom[ray]'`). auto takes Ray where --ray-address is given."""
    ray_address: str = ""
    """Address of a Ray cluster, or `auto` for the one this machine belongs to; without, --engine
    ray starts one here."""
    rank: Annotated[int | None, arg(metavar="INT")] = None
    """Which of --world processes this is, from 0. Without: what torchrun or Slurm says."""
    world: Annotated[int | None, arg(metavar="INT")] = None
    """How many processes share the work without talking; each is started with its own --rank."""
    dry_run: bool = False
    """Say what it would take (shards, bytes, time) and stop."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to do."""
        require_at_least(1, self, "shard_episodes", "batch_episodes")
        require_at_least(0, self, "workers", "skip_bad")


def tokenize(config: TokenizeConfig) -> "Path | TokenizeDryRun | None":
    """Encode every episode; return the folder of shards, or None while other ranks' are missing."""
    share = _share(config)
    episodes = Episodes(config.episodes)
    # Here and not above: `worldloom tokenize --help` must not wait for torch.
    from worldloom.tokenizer import load_tokenizer

    from .devices import choose_device
    from .tokenize_merge import finished_unit, merge, require_bound, skipped_of, tidy
    from .units import make_plan, units_of

    device = config.device
    # The GPUs are the cluster's: who only hands out the work may have none.
    if config.dry_run or device != "cuda" or not _by_ray(config):
        device = choose_device(device)
    tokenizer = load_tokenizer(config.tokenizer)
    _check_frames(config, episodes, tokenizer.spec)
    plan = make_plan(
        episodes,
        tokenizer,
        shard_episodes=config.shard_episodes,
        batch_episodes=config.batch_episodes,
    )
    job = _job(config, plan, device)
    units = range(len(units_of(episodes.keys, config.shard_episodes)))
    if config.dry_run:
        return _dry_run(config, job, episodes, tokenizer, share)
    keep_plan(config.output, plan)
    if is_finished(config.output):
        # One rank may have been killed over the manifest while another wrote it.
        tidy(config.output, len(units))
        say(f"{config.output}: finished before, nothing to do")
        return config.output
    mine = share.of(units)
    found = {index: finished_unit(config.output, index) for index in mine}
    pending = [index for index, record in found.items() if record is None]
    skipped = {key: why for record in found.values() if record for key, why in skipped_of(record)}
    require_bound(job, skipped)
    workers = _num_workers(config, share, device, len(pending))
    if share.world > 1:
        say(
            f"rank {share.rank} of {share.world} ({share.launcher}): {len(mine)} of {len(units)} "
            f"shards are its own, {len(pending)} of them still to do"
        )
    # Closed here and not by the garbage collector: whatever stops this, no process is left.
    with closing(_reports(config, job, episodes, tokenizer, share, pending, workers)) as reports:
        done = len(mine) - len(pending)
        for report in progress(reports, "encoding shards", total=len(mine), done=done):
            for why in report.skipped.values():
                say(f"skipped: {config.episodes}/{why}")
            skipped |= report.skipped
            require_bound(job, skipped)
    merged = merge(job, episodes, tokenizer, share)
    if merged is None:
        return None
    _say_what_was_written(config, merged, kept=done)
    return config.output


def _share(config: TokenizeConfig) -> Share:
    """Return which part of the work is this process's."""
    if _by_ray(config):
        if config.rank is not None or config.world is not None:
            raise ConfigError(
                "--rank and --engine ray: Ray hands out the work itself; leave one of the two out"
            )
        return Share()
    return find_share(config.rank, config.world)


def _by_ray(config: TokenizeConfig) -> bool:
    if config.engine == "processes" and config.ray_address:
        raise ConfigError("--ray-address goes with --engine ray, not with --engine processes")
    return config.engine == "ray" or bool(config.ray_address)


def _job(config: TokenizeConfig, plan: Mapping[str, Any], device: str) -> "TokenizeJob":
    """Return what every worker needs to know."""
    from .units import TokenizeJob

    return TokenizeJob(
        episodes=config.episodes,
        tokenizer=config.tokenizer,
        output=config.output,
        device=device,
        threads=1 if device == "cpu" else 0,
        shard_episodes=config.shard_episodes,
        batch_episodes=config.batch_episodes,
        skip_bad=config.skip_bad,
        plan=plan,
    )


def _for_elsewhere(job: "TokenizeJob") -> "TokenizeJob":
    """Return the job for a process that stands in another folder."""
    tokenizer, (name, equals, folder) = job.tokenizer, job.tokenizer.partition("=")
    if Path(tokenizer).exists():
        tokenizer = str(Path(tokenizer).absolute())
    elif equals:
        tokenizer = f"{name}={Path(folder).absolute()}"
    return replace(
        job, episodes=job.episodes.absolute(), output=job.output.absolute(), tokenizer=tokenizer
    )


def _num_workers(config: TokenizeConfig, share: Share, device: str, pending: int) -> int:
    """Return how many processes of this machine shall work."""
    wanted = config.workers
    if not wanted and device == "cuda":
        import torch

        wanted = torch.cuda.device_count() // share.local_world
    elif not wanted and device == "cpu":
        wanted = num_cores(share)
    return max(1, min(wanted, pending))


def _on_device(job: "TokenizeJob", number: int) -> "TokenizeJob":
    """Return the job of the number-th worker of this machine: GPUs are taken in turn."""
    if job.device != "cuda":
        return job
    import torch

    return replace(job, device=f"cuda:{number % torch.cuda.device_count()}")


def _reports(  # noqa: PLR0913 - what was decided and loaded above
    config: TokenizeConfig,
    job: "TokenizeJob",
    episodes: Episodes,
    tokenizer: "VideoTokenizer",
    share: Share,
    pending: Sequence[int],
    workers: int,
) -> "Generator[UnitReport, None, None]":
    """Have every pending unit done; yield a report as each is durable."""
    if not pending:
        return
    if _by_ray(config):
        from .ray_engine import answers

        yield from answers(
            _for_elsewhere(job), pending, workers=config.workers, address=config.ray_address
        )
        return
    from .units import UnitWorker, open_unit_worker

    jobs = [_on_device(job, share.local_rank * workers + number) for number in range(workers)]
    if workers == 1:
        loaded = job.device == "cpu"
        worker = UnitWorker(job, episodes, tokenizer) if loaded else open_unit_worker(jobs[0])
        with closing(worker):
            for index, following in zip(pending, [*pending[1:], None], strict=True):
                yield worker.answer(index, following=following)
        return
    from .crew import Crew

    with Crew.with_jobs(open_unit_worker, [_for_elsewhere(job) for job in jobs]) as crew:
        yield from crew.answers(pending)


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


def _dry_run(
    config: TokenizeConfig,
    job: "TokenizeJob",
    episodes: Episodes,
    tokenizer: "VideoTokenizer",
    share: Share,
) -> "TokenizeDryRun":
    """Say what it would take; write nothing."""
    from .tokenize_dry_run import estimate
    from .tokenize_merge import finished_unit
    from .units import units_of

    output, num_units = config.output, len(units_of(episodes.keys, config.shard_episodes))
    if (output / "plan.json").exists():
        require_plan(read_plan(output), job.plan, output=output)
    mine = share.of(range(num_units))
    pending = [index for index in mine if finished_unit(output, index) is None]
    return estimate(
        job,
        episodes,
        tokenizer,
        pending=pending,
        workers=_num_workers(config, share, job.device, len(pending)),
    )


def _say_what_was_written(
    config: TokenizeConfig,
    merged: "Merged",
    kept: int,
) -> None:
    metrics, records, skipped = merged.metrics, merged.records, merged.skipped
    measured = (
        "held-out episodes"
        if metrics["split"] == "validation"
        else "training episodes (none is held out)"
    )
    quality = (
        f"{metrics['psnr_db']:.1f} dB, {metrics['moving_psnr_db']:.1f} dB on what moves"
        if metrics["psnr_db"] is not None
        else "was not measured: all of them are damaged"
    )
    size_bytes = sum(record.size_bytes for record in records)
    num_episodes = sum(len(record.episodes) for record in records)
    say(
        f"wrote {config.output}: {len(records)} shards"
        + (f" ({kept} were there before)" if kept else "")
        + f", {num_episodes} episodes, {size_bytes / 1e6:.1f} MB in all; reconstruction on "
        f"{measured} {quality}"
    )
    if skipped:
        say(f"skipped {len(skipped)} damaged episodes: {', '.join(sorted(skipped))}")
    dynamics = config.output.parent / "dynamics"
    words = ["worldloom", "train-dynamics", "--shards", str(config.output), "--tokenizer",
             config.tokenizer, "--output", str(dynamics)]  # fmt: skip
    say(f"next: {shlex.join(words)}")
