"""The markers of all shards -> codebook and manifest; whoever finds every marker does it.

    shard-%06d.json, ...  ->  merge  ->  codebook.safetensors, manifest.json

Everything comes from the markers, in the order of the shards, so nothing is read or measured twice
and the same bytes come out whoever merges. Two ranks that do so at once do no harm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.common import (
    Episodes,
    FormatError,
    ShardRecord,
    finished_shard,
    remove_leftovers,
    say,
    shard_name,
    write_manifest,
)
from worldloom.tokenizer import VideoTokenizer

from .encoding import SquaredErrors
from .ranks import Share
from .shard_plan import read_plan, require_plan
from .units import (
    TokenizeJob,
    measured_split,
    too_many_damaged,
    unit_files,
    units_of,
)


@dataclass(frozen=True, slots=True)
class Merged:
    """What the manifest was made of."""

    records: Sequence[ShardRecord]
    metrics: Mapping[str, Any]
    skipped: Mapping[str, str]


def finished_unit(output: Path, index: int, /, *, check_hash: bool = True) -> ShardRecord | None:
    """Return the record of a unit that is finished, with all that merging needs, or None."""
    record = finished_shard(output, index, check_hash=check_hash)
    return record if record is not None and _errors_of(record) is not None else None


def skipped_of(record: ShardRecord, /) -> list[tuple[str, str]]:
    """Return key and reason of the damaged episodes that a shard was made without."""
    return sorted(record.skipped.items())


def require_bound(job: TokenizeJob, skipped: Mapping[str, str]) -> None:
    """Refuse more damaged episodes, over all units, than may be skipped."""
    if len(skipped) > job.skip_bad:
        raise too_many_damaged(skipped, job.skip_bad, job.episodes)


def merge(
    job: TokenizeJob,
    episodes: Episodes,
    tokenizer: VideoTokenizer,
    share: Share,
    /,
) -> Merged | None:
    """Write codebook and manifest if every shard is there; else say which are not, return None.

    Several ranks may find every marker at once: they write the same bytes.
    """
    output, units = job.output, units_of(episodes.keys, job.shard_episodes)
    require_plan(read_plan(output), job.plan, output=output)
    found = [finished_unit(output, index, check_hash=False) for index in range(len(units))]
    records = [record for record in found if record is not None]
    if len(records) < len(units):
        missing = [index for index, record in enumerate(found) if record is None]
        ranks = sorted({index % share.world for index in missing})
        say(
            f"{output}: {len(missing)} of {len(units)} shards are still missing ("
            f"{', '.join(map(shard_name, missing[:3]))}{', ...' * (len(missing) > 3)}), of rank "
            f"{', '.join(map(str, ranks))}; the rank that finds every one writes the manifest. "
            "What has stopped goes on when it is started again"
        )
        return None
    skipped = {key: why for record in records for key, why in skipped_of(record)}
    require_bound(job, skipped)
    if not any(record.episodes for record in records):
        raise FormatError(f"{job.episodes}: every episode is damaged, so there are no shards")
    # Sums in the order of the units, so that the last bit does not tell who did which.
    errors = sum(filter(None, map(_errors_of, records)), SquaredErrors())
    metrics = {**errors.psnr(), "split": measured_split(episodes)}
    if not errors.pixels:  # every held-out episode is damaged
        metrics |= {"psnr_db": None, "moving_psnr_db": None}
    write_manifest(
        output,
        records,
        tokenizer=tokenizer.spec,
        actions=episodes.spec.actions,
        codebook_VZ=tokenizer.codebook.cpu().numpy(),
        fps=episodes.spec.fps,
        frame_skip=episodes.spec.frame_skip,
        metrics=metrics,
        source={"episodes": dict(episodes.spec.source), "plan": dict(job.plan), "skipped": skipped},
    )
    tidy(output, len(units))
    return Merged(records, metrics, skipped)


def tidy(output: Path, num_units: int, /) -> None:
    """Delete what killed ranks left in a folder whose every unit is done.

    Nobody writes a unit any more then; the manifest another rank may.
    """
    remove_leftovers(output, of={name for i in range(num_units) for name in unit_files(i)})
    remove_leftovers(output, of={"manifest.json", "codebook.safetensors"}, shared=True)


def _errors_of(record: ShardRecord) -> SquaredErrors | None:
    """Return what a unit measured, or None if the marker does not say."""
    try:
        errors = SquaredErrors(**record.measured)  # type: ignore[arg-type]  # checked below
    except TypeError:
        return None
    numbers = [*record.measured.values()]
    whole = isinstance(errors.pixels, int) and isinstance(errors.moving_pixels, int)
    plain = all(isinstance(n, int | float) and n >= 0 for n in numbers)
    return errors if len(numbers) == 4 and whole and plain else None
