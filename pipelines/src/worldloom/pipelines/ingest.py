"""Recordings of anyone's -> episodes: exact frames, the actions that led to them, their names.

    worldloom ingest videos recordings --output runs/mine/episodes --resize crop

reads a folder and writes EPISODES/episodes.json, EPISODES/skipped.json and one EPISODES/KEY.npz a
recording (docs/formats.md; docs/data.md says how each kind is read). A recording's file depends on
the settings and that recording alone: any number of workers, interrupted or not, writes the same
bytes.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from worldloom.common import (
    ConfigError,
    EpisodesSpec,
    FormatError,
    progress,
    read_json,
    say,
    write_json,
)

from .checks import require_at_least
from .crew import Crew
from .episode_folder import claimed, keep_spec
from .ingest_config import IngestConfig as IngestConfig
from .ingest_worker import (
    IngestJob,
    IngestReport,
    SkippedRecording,
    first_episode,
    first_frame_size,
    open_reader,
)
from .sources import Recording, Source, open_source
from .sources.keys import MAX_SOURCE_KEY

SKIPPED_SCHEMA = "worldloom.skipped/1"


def ingest(config: IngestConfig) -> Path:
    """Read recordings until config.output has all of them; return that folder.

    Raises:
        FormatError: if the source is not of its kind, empty, or has more than `skip_bad`
            recordings that cannot be read.
        ConfigError: if a setting does not fit the source or what the folder holds.
    """
    _check(config)
    began, path, folder = time.monotonic(), config.path.absolute(), config.output.absolute()
    source = open_source(config.kind, path, config)
    recordings = list(source.recordings)[: config.num_recordings or None]
    if not recordings:
        raise FormatError(f"{config.path}: has no recordings of kind {config.kind}")
    say(f"{config.path}: {len(source.recordings)} recordings, {source.fps:g} frames per second")
    say(f"actions: {_describe(source)}")
    say(f"alignment: {source.alignment}")
    with claimed(folder, config.output, doing="ingest"):
        spec = episodes_spec(config, source)
        missing = [
            recording
            for recording in recordings
            if not (folder / f"{first_episode(recording.key, config.max_frames)}.npz").exists()
        ]
        _require_size(missing, source, config)
        keep_spec(folder, spec, config.output, complete=not missing)
        _require_no_strangers(folder, source, config)
        job = IngestJob(
            folder=folder,
            source=source,
            spec=spec,
            resize=config.resize,
            max_frames=config.max_frames,
        )
        reports: list[IngestReport] = []
        skipped: list[SkippedRecording] = []
        try:
            for answer in _answers(config, job, missing, len(recordings)):
                if isinstance(answer, IngestReport):
                    reports.append(answer)
                    continue
                skipped.append(answer)
                _say_or_stop(config, skipped)
        finally:
            _keep_skipped(folder, config, source, skipped)
    _say_what_was_written(config, reports, skipped, len(recordings), time.monotonic() - began)
    return config.output


def _check(config: IngestConfig) -> None:
    """Refuse what no source could use, before anything is read."""
    require_at_least(1, config, "height", "width", "frame_skip", "workers")
    require_at_least(0, config, "max_frames", "num_recordings", "skip_bad")
    if config.fps is not None and not 0 < config.fps < 1e6:
        raise ConfigError(f"--fps must be a positive number, got {config.fps}")
    if config.path.absolute() == config.output.absolute():
        raise ConfigError(f"--output {config.output}: is the source itself; choose a new folder")


def episodes_spec(config: IngestConfig, source: Source, /) -> EpisodesSpec:
    """Return what all episodes are of, with everything that decides their bytes."""
    about = {**source.about, "kind": config.kind, "alignment": source.alignment}
    if config.frame_skip > 1:
        about["combining"] = source.combining
    return EpisodesSpec(
        actions=source.actions,
        height=config.height,
        width=config.width,
        fps=source.fps / config.frame_skip,
        frame_skip=config.frame_skip,
        source={**about, "resize": config.resize, "max_frames": config.max_frames},
        half_labelled=(
            config.kind in ("videos", "npz")
            and config.actions.missing == "unlabelled"
            and source.actions.kind != "none"
        ),
    )


def _describe(source: Source) -> str:
    """Return what the actions are, and where they were found."""
    names = source.actions.names
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    columns = ", ".join(source.about.get("columns", []))
    found = f", read from {columns}" if columns else ""
    return f"{source.actions.kind} ({listed}){found}" if names else source.actions.kind


def _require_no_strangers(folder: Path, source: Source, config: IngestConfig) -> None:
    """Refuse a folder whose episodes come from other recordings than those of this source."""
    there = {path.stem for path in folder.glob("*.npz") if not path.name.startswith("tmp-")}
    ours = {recording.key for recording in source.recordings}
    if config.max_frames:
        there = {key.rpartition("-")[0] for key in there}
    strangers = sorted(there - ours)
    if strangers:
        raise ConfigError(
            f"{config.output}: has episodes of {len(strangers)} recordings that {config.path} has "
            f"not: {', '.join(strangers[:3])}. Choose a new folder"
        )


def _require_size(missing: list[Recording], source: Source, config: IngestConfig) -> None:
    """Refuse frames that would have to be resized without a rule, before anything is written."""
    if config.resize != "exact":
        return
    for recording in missing[: config.skip_bad + 1]:
        try:
            height, width = first_frame_size(source, recording)
        except FormatError:
            continue  # it is named when its turn comes
        if (height, width) != (config.height, config.width):
            raise ConfigError(
                f"{recording.origin}: frames are {height}x{width} (height x width), not "
                f"{config.height}x{config.width}; give --height {height} --width {width}, "
                "or --resize stretch, crop or pad"
            )
        return


def _answers(
    config: IngestConfig, job: IngestJob, missing: list[Recording], total: int
) -> Iterator[IngestReport | SkippedRecording]:
    """Yield what became of every missing recording."""
    for recording in job.source.recordings:
        if len(recording.key) > MAX_SOURCE_KEY:
            raise FormatError(f"{recording.origin}: key {recording.key!r:.100} is too long")
    if not missing:
        return
    with Crew(open_reader, job, size=min(config.workers, len(missing))) as crew:
        answers: Iterable[IngestReport | SkippedRecording] = crew.answers(
            recording.key for recording in missing
        )
        yield from progress(answers, "ingesting", total=total, done=total - len(missing))


def _say_or_stop(config: IngestConfig, skipped: list[SkippedRecording]) -> None:
    """Name a recording that was left out, or stop where no more may be."""
    newest, path = skipped[-1], str(config.path.absolute())
    reason = newest.reason.replace(path, str(config.path))
    if len(skipped) <= config.skip_bad:
        say(f"skipped {newest.origin!r}: {reason}")
        return
    many = "" if len(skipped) == 1 else f" ({len(skipped) - 1} were skipped before)"
    raise FormatError(
        f"{reason}{many}; mend or remove it, or leave out bad recordings with --skip-bad "
        f"{len(skipped)} or more. What was finished is kept"
    )


def _keep_skipped(
    folder: Path, config: IngestConfig, source: Source, skipped: list[SkippedRecording]
) -> None:
    """Write EPISODES/skipped.json: what this folder lacks, and why; none if it lacks nothing."""
    file = folder / "skipped.json"
    rows = {}
    if file.exists():  # what was skipped before and has not had its turn again stays
        before = read_json(file, what="what `worldloom ingest` skipped")
        if before.get("schema") != SKIPPED_SCHEMA or not isinstance(before.get("skipped"), list):
            raise FormatError(f"{file}: not written by `worldloom ingest`; move it away")
        rows = {row["key"]: row for row in before["skipped"]}
    for row in skipped:
        # A machine's folders are nobody's business: the reason names paths inside the source.
        reason = row.reason.replace(f"{config.path.absolute()}/", "")
        rows[row.key] = {"key": row.key, "origin": row.origin, "reason": reason}
    missing = sorted(
        recording.key
        for recording in source.recordings
        if recording.key in rows
        and not (folder / f"{first_episode(recording.key, config.max_frames)}.npz").exists()
    )
    if missing:
        table = {"schema": SKIPPED_SCHEMA, "skipped": [rows[key] for key in missing]}
        write_json(file, table)
    else:
        file.unlink(missing_ok=True)


def _say_what_was_written(
    config: IngestConfig,
    reports: list[IngestReport],
    skipped: list[SkippedRecording],
    total: int,
    seconds: float,
) -> None:
    episodes = sum(report.num_episodes for report in reports)
    frames = sum(report.num_frames for report in reports)
    unlabelled = sum(not report.labelled for report in reports)
    megabytes = sum(report.size_bytes for report in reports) / 1e6
    before = total - len(reports) - len(skipped)
    say(
        f"{config.output}: wrote {episodes} episodes, {frames} frames, {megabytes:.1f} MB of "
        f"{len(reports)} recordings in {seconds:.1f} s"
        + (f"; {unlabelled} of them without known actions" if unlabelled else "")
        + (f"; {before} were there before" if before else "")
        + (f"; {len(skipped)} skipped, see skipped.json" if skipped else "")
    )
    if total == len(skipped):
        raise FormatError(f"{config.path}: every recording was skipped, so there are no episodes")
    output = config.output
    say(f"check: worldloom info {output} --preview {output.parent / 'preview.png'}")
    tokenizer = output.parent / "tokenizer"
    say(f"next: worldloom train-tokenizer --episodes {output} --output {tokenizer}")
