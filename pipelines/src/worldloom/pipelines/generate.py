"""First frames and actions -> video, true next to generated.

    model, tokenizer, start, actions  ->  OUTPUT/{generated.mp4, generated.gif, contact-sheet.png,
                                          codes.npz, session.json}
    the same, several starts          ->  OUTPUT/{starts.json, contact-sheet.png, start-000/...}

session.json and codes.npz hold everything that was decided: the same command gives the same codes.
Several starts, and several futures of each, run as one batch; each start gets a folder like that of
a start alone, with the same codes.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from worldloom.common import atomic_folder, progress, say, to_json

from .checks import require_own_output
from .generate_config import GenerateConfig as GenerateConfig

if TYPE_CHECKING:
    from .generation import Futures, Job, OwnFutures, Timing
    from .world import World

SESSION_SCHEMA = "worldloom.session/1"
STARTS_SCHEMA = "worldloom.starts/1"


def generate(config: GenerateConfig) -> Path:
    """Generate video from starts and actions; return the folder with what came out."""
    from .devices import choose_device
    from .generation import compare_decoders, roll
    from .world import World

    several = (config.output / "starts.json").is_file()
    require_own_output(
        config.output, sign="starts.json" if several else "session.json", command="generate"
    )
    world = World.from_pretrained(
        config.model,
        config.tokenizer,
        sampling=config.sampling,
        device=choose_device(config.device),
    )
    seeds = range(config.seed, config.seed + config.num_samples)
    jobs = _jobs(config, world)
    futures = roll(world, jobs, seeds=seeds, label="generating")
    timings = compare_decoders(world, jobs, seeds=seeds) if config.compare_decoders else []
    with atomic_folder(config.output) as folder:
        if len(jobs) == 1:
            _write_start(folder, config, world, jobs[0], futures.jobs[0])
        else:
            _write_starts(folder, config, world, jobs, futures)
        if timings:
            (folder / "decoders.json").write_text(to_json([asdict(row) for row in timings]))
    _say_result(config, jobs, futures, timings)
    return config.output


def _jobs(config: GenerateConfig, world: "World") -> "list[Job]":
    """Return every start and its actions, once it is known that all of them fit into memory."""
    from .generation import Job, chosen_actions, chosen_moments
    from .generation_memory import measure_world, require_room
    from .starts import read_start

    moments, spec = chosen_moments(config, world), world.model.spec.actions
    # One start tells what all of them take, before the others are read.
    wanted = config.actions == "true"
    starts = [read_start(config.start, world, moments[0], with_frames=wanted)]
    actions = chosen_actions(config, spec, starts * len(moments))
    # What follows the starts that are not read yet may be longer than what follows this one.
    steps = config.horizon if wanted and len(moments) > 1 else max(map(len, actions))
    cost = measure_world(world, Job(starts[0], actions[0]), steps=steps, scale=config.scale)
    samples = config.num_samples
    require_room(
        cost, starts=len(moments), samples=samples, device=world.model.device,
        copies=1 + wanted / samples + config.compare_decoders,
    )  # fmt: skip
    starts += [
        read_start(config.start, world, moment, with_frames=wanted) for moment in moments[1:]
    ]
    actions = chosen_actions(config, spec, starts)
    return [Job(start, slots_TA) for start, slots_TA in zip(starts, actions, strict=True)]


def _write_starts(
    folder: Path, config: GenerateConfig, world: "World", jobs: "Sequence[Job]", futures: "Futures"
) -> None:
    """Write a folder for every start, and what is of all of them."""
    from .generated_pictures import draw_starts

    names = [f"start-{number:03d}" for number in range(len(jobs))]
    for number, name in enumerate(progress(names, "drawing")):
        (folder / name).mkdir()
        _write_start(folder / name, config, world, jobs[number], futures.jobs[number])
    draw_starts(
        folder / "contact-sheet.png",
        jobs,
        [own.frames[0] for own in futures.jobs],
        show_true=config.actions == "true",
    )
    content = {
        "schema": STARTS_SCHEMA,
        "starts": [
            {"folder": name, "start": job.start.source, "num_frames": len(job.slots_TA)}
            for name, job in zip(names, jobs, strict=True)
        ],
        "num_samples": config.num_samples,
        "seconds": futures.seconds,
        "frames_per_s": futures.frames_per_s,
        "forwards_per_frame": futures.forwards_per_frame,
    }
    (folder / "starts.json").write_text(to_json(content))


def _write_start(
    folder: Path, config: GenerateConfig, world: "World", job: "Job", own: "OwnFutures"
) -> None:
    """Write the codes, the session and the pictures of one start."""
    from .action_sources import action_words
    from .generated_pictures import Look, draw_start

    spec, seeds = world.model.spec, list(range(config.seed, config.seed + config.num_samples))
    words = action_words(spec.actions, job.slots_TA)
    session = {
        "schema": SESSION_SCHEMA,
        "model": str(config.model),
        "tokenizer": spec.tokenizer.fingerprint,
        "start": job.start.source,
        "prompt_frames": len(job.start.codes_thw),
        "prompt_actions": job.start.slots_TA.tolist(),
        "actions": job.slots_TA.tolist(),
        "action_names": words,
        "seeds": seeds,
        "sampling": asdict(config.sampling),
        "fps": spec.fps,
    }
    look = Look(
        titles=[f"seed {seed}" for seed in seeds] if len(seeds) > 1 else ["generated"],
        show_true=config.actions == "true",
        scale=config.scale,
        fps=spec.fps,
    )
    draw_start(folder, job, own.frames, words=words, look=look)
    np.savez(folder / "codes.npz", codes=own.codes_Sthw, actions=job.slots_TA)
    (folder / "session.json").write_text(to_json(session))


def _say_result(
    config: GenerateConfig, jobs: "Sequence[Job]", futures: "Futures", timings: "Sequence[Timing]"
) -> None:
    """Say how fast it was, what each decoder did, where to look, and what to do next."""
    for row in timings:
        same = "the same codes" if row.same_codes else "OTHER CODES"
        say(f"  {row.decoder:<8} {row.frames_per_s:8.1f} frames/s  "
            f"{row.forwards_per_frame:6.2f} forwards/frame  {same}")  # fmt: skip
    several, worlds = len(jobs) > 1, len(jobs) * config.num_samples
    where = f"{len(jobs)} starts" if several else jobs[0].start.source
    side_by_side = f", {worlds} worlds side by side" if worlds > 1 else ""
    look = config.output / ("contact-sheet.png" if several else "generated.gif")
    say(
        f"generated {futures.num_frames} frames from {where} in {futures.seconds:.1f} s "
        f"({futures.frames_per_s:.1f} frames/s, decoded{side_by_side}; "
        f"{futures.forwards_per_frame:.1f} forwards a frame); look at {look}"
    )
    say(f"next: {shlex.join(_another(config))}")


def _another(config: GenerateConfig) -> list[str]:
    """Return the command for another future of the same starts: other actions, or another seed."""
    words = ["worldloom", "generate", "--model", str(config.model), "--tokenizer",
             config.tokenizer, "--start", str(config.start)]  # fmt: skip
    usual: dict[str, str | int] = {
        "episode": "0", "start_frame": 0, "num_starts": 0, "prompt_frames": 4
    }  # fmt: skip
    if config.num_starts:
        usual["horizon"] = 32  # which starts they are depends on how far they lie apart
    for name, value in usual.items():
        if getattr(config, name) != value:
            words += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    if config.actions in ("random", "sticky"):
        seed = config.seed + config.num_samples
        words += ["--actions", config.actions, "--seed", str(seed)]
        return [*words, "--output", f"{config.output}-seed-{seed}"]
    return [*words, "--actions", "sticky", "--output", f"{config.output}-sticky"]
