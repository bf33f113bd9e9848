"""A demo run's folder -> report.html, one page that opens from disk, and report.json, its numbers.

    RUN/{episodes/, tokenizer/, shards/, dynamics/, evaluation/, stages.json}
        -> write_report -> RUN/report.html (pictures inside), RUN/report.json

report.json has the groups of evaluation/evaluation.json under the same keys, and
`stages.NAME.seconds`.
"""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from worldloom.common import (
    Episodes,
    FormatError,
    TokenShards,
    read_json,
    read_metrics,
    write_bytes,
    write_json,
)

from .charts import Line, chart_svg
from .commands import COMMANDS
from .page import bars, card, chart, duration, moving, page, percent, read, sheet
from .pictures import Strip, draw_sheet, encode_png, fitting_scale

NUMBERS = ("tokenizer", "dynamics", "rollout", "play")
"""Groups of evaluation.json that report.json repeats."""


def write_report(
    run: Path, /, *, title: str, commands: Sequence[str], next_steps: str = ""
) -> Path:
    """Write RUN/report.html and RUN/report.json; return the former's path.

    Args:
        run: the folder, every stage of which is finished.
        title: of the page: what was learned.
        commands: that make all of it again, one a line.
        next_steps: a last sentence: what one could do now. Plain text.

    Raises:
        FormatError: if a stage's output is missing or unreadable.
        StorageError: if the disk refuses.
    """
    evaluation = read_json(
        run / "evaluation" / "evaluation.json", what="the numbers of `worldloom evaluate`"
    )
    stages = read_json(run / "stages.json", what="the seconds of a demo's stages")
    env = read_json(run / "tokenizer" / "env.json", what="the versions a run used")
    try:
        numbers = {group: dict(evaluation[group]) for group in NUMBERS}
        # JSON keeps no order; the commands' own is that of the data.
        order = [name for name in COMMANDS if name in stages]
        seconds = {name: float(stages[name]["seconds"]) for name in order}
        body = [
            _opening(run, title, evaluation, seconds),
            _numbers(evaluation),
            _recorded(run),
            _tokenizer(run, evaluation),
            _dynamics(run),
            _held(run, evaluation),
            _rollouts(run, evaluation),
            _time(seconds),
            _again(commands, env, next_steps),
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(
            f"{run}: an output of the demo lacks {error}; run `worldloom demo` again to remake it"
        ) from error
    write_json(
        run / "report.json",
        {
            **numbers,
            "settings": evaluation["settings"],
            "stages": {name: {"seconds": value} for name, value in seconds.items()},
            "environment": env,
        },
    )
    write_bytes(run / "report.html", page(title, body).encode())
    return run / "report.html"


def _opening(
    run: Path, title: str, evaluation: Mapping[str, Any], seconds: Mapping[str, float]
) -> str:
    """Title, one sentence, the moving picture, the five numbers to remember."""
    shards = TokenShards(run / "shards")
    frames = sum(row.num_frames for row in shards.episodes)
    t, d, r, p = (evaluation[group] for group in NUMBERS)
    first = evaluation["pictures"]["rollouts"][0]
    hero = moving(
        run / "evaluation",
        first,
        alt=f"Two games beside each other: the recorded one, and the one generated from its first "
        f"{r['prompt_frames']} frames and the same actions.",
    )
    cards = [
        ("Reconstruction", f"{t['psnr_db']:.1f}", "dB",
         f"{t['moving_psnr_db']:.1f} dB on what moves"),
        ("First frame, codes right", f"{100 * d['free_running_accuracy']:.0f}", "%",
         f"copying the last frame: {100 * d['copy_accuracy']:.0f}%"),
        (f"{r['horizon_frames']} frames, over copying", f"{r['psnr_over_copy_db']:+.1f}", "dB",
         f"{r['psnr_db']:.1f} against {r['copy_psnr_db']:.1f} dB"),
        ("Control by the keys", f"{r['delta_psnr_db']:+.1f}", "dB", "true against random actions"),
        ("Speed", f"{p['frames_per_s']:.0f}", "frames/s",
         f"{p['p50_ms']:.0f} ms each, with pixels"),
    ]  # fmt: skip
    return f"""<header>
<h1>{html.escape(title)}</h1>
<p class="lead">Learned from {frames:,} recorded frames in {duration(sum(seconds.values()))}, from
the first recording to this page. All numbers and generated frames below are of episodes that it
never trained on.</p>
</header>
<figure class="hero">{hero}</figure>
<p class="note" style="margin-top:.7rem">Left: what really happened. Right: what the model makes
of the first {r["prompt_frames"]} frames and the same actions, frame after frame from its own
output.</p>
<dl class="cards">{"".join(card(*texts) for texts in cards)}</dl>
"""


def _numbers(evaluation: Mapping[str, Any]) -> str:
    """Return the table of every number, its baseline and its meaning."""
    t, d, r, p = (evaluation[group] for group in NUMBERS)
    horizon = r["horizon_frames"]
    rows = [
        ("Reconstruction", f"{t['psnr_db']:.2f} dB", "",
         "PSNR of frames encoded to codes and decoded again: the best any rollout can look."),
        ("Reconstruction of what moves", f"{t['moving_psnr_db']:.2f} dB", "",
         "The same over pixels that differ from their clip's median: what is played with."),
        ("Structural similarity", "&ndash;" if t["ssim"] is None else f"{t['ssim']:.3f}", "",
         "SSIM of reconstructions; 1 is equal."),
        ("Codes in use", f"{100 * t['codes_used_fraction']:.0f}%", "",
         f"Of the codebook, over all recorded frames; perplexity {t['perplexity']:.0f}."),
        ("Cross-entropy", f"{d['cross_entropy']:.2f} nats", "",
         "Per code, given all true ones before it: how surprised the model is."),
        ("Right codes, teacher-forced", percent(d["teacher_forced_accuracy"]),
         percent(d["copy_accuracy"]),
         "Likeliest code right, given the true codes around it. Flatters every model."),
        ("Right codes, free-running", percent(d["free_running_accuracy"]),
         percent(d["copy_accuracy"]),
         "Codes of the first generated frame, sampled as in play, that equal the true ones."),
        (f"Rollout, {horizon} frames", f"{r['psnr_db']:.2f} dB", f"{r['copy_psnr_db']:.2f} dB",
         "PSNR of generated frames to the true ones, all actions given."),
        ("Rollout over copying", f"{r['psnr_over_copy_db']:+.2f} dB", "0 dB",
         "By how much it beats repeating the last frame it was given."),
        ("Rollout, random actions", f"{r['random_psnr_db']:.2f} dB", "",
         "The same starts and seeds with other keys pressed: should be worse."),
        ("Control", f"{r['delta_psnr_db']:+.2f} dB", "0 dB",
         "True minus random actions: 0 would mean that the keys do nothing."),
        ("Drift", f"{r['drift_db_per_frame']:+.2f} dB a frame", "",
         f"Slope of the rollout's PSNR over its {horizon} frames."),
        ("Speed", f"{p['frames_per_s']:.1f} frames/s", "",
         f"One world, with pixels; {p['p50_ms']:.0f} ms a frame, 95% within {p['p95_ms']:.0f} ms."),
    ]  # fmt: skip
    lines = "".join(
        f'<tr><th scope="row">{name}</th><td class="number">{value}</td>'
        f'<td class="number baseline">{baseline}</td><td class="meaning">{meaning}</td></tr>\n'
        for name, value, baseline, meaning in rows
    )
    settings = evaluation["settings"]
    return f"""<h2>The numbers</h2>
<p>On {settings["num_episodes"]} held-out episodes, {r["num_rollouts"]} rollouts from
{r["prompt_frames"]} frames each, seed {settings["seed"]}. A PSNR over many frames is that of their
mean squared error.</p>
<table class="numbers"><thead><tr><th scope="col">What</th>
<th scope="col" class="number">This model</th>
<th scope="col" class="number">Copying the last frame</th><th scope="col">Meaning</th></tr></thead>
<tbody>
{lines}</tbody></table>
"""


def _recorded(run: Path) -> str:
    """Return the recorded frames and how often each action was chosen."""
    episodes = Episodes(run / "episodes")
    spec = episodes.spec
    counts: Counter[str] = Counter()
    steps = 0
    for key in episodes.keys:
        with episodes.open(key) as episode:
            slots = episode.slots_TA
        if slots is None:  # nobody knows them
            continue
        # Describing each distinct action once: describing every step takes seconds.
        kinds, times = np.unique(slots, axis=0, return_counts=True)
        steps += len(slots)
        for name, count in zip(spec.actions.describe(kinds), times.tolist(), strict=True):
            counts[name] += count
    with episodes.open(episodes.keys[0]) as episode:
        stop = min(episode.num_frames, 12)
        frames = episode.frames(0, stop)
        slots = episode.slots_TA
    words = ["?"] * (stop - 1) if slots is None else spec.actions.describe(slots[: stop - 1])
    labels = ["", *words]
    picture = draw_sheet(
        [Strip(title="", frames_THWC=frames, labels=labels)],
        scale=fitting_scale(spec.height, spec.width, target=144),
        columns=6,
    )
    source = spec.source.get("env", "a game")
    histogram = bars([(name, n / max(1, steps), f"{n:,}") for name, n in counts.most_common(12)])
    actions = f"<h3>Actions chosen</h3>{histogram}" if steps and spec.actions.num_slots else ""
    return f"""<h2>What was recorded</h2>
<p>{len(episodes.keys)} episodes of {html.escape(str(source))}, {spec.width}&times;{
        spec.height
    } pixels,
{spec.fps:g} frames a second{
        f", one of every {spec.frame_skip} game frames" if spec.frame_skip > 1 else ""
    },
losslessly. {len(episodes.split("validation"))} of the episodes were held out.</p>
{
        sheet(
            encode_png(picture),
            "Recorded frames, each under the action that led to it.",
            "The first frames of one episode; over each frame the action that led to it.",
        )
    }
{f'<div style="margin-top:1.75rem;max-width:42rem">{actions}</div>' if actions else ""}
"""


def _tokenizer(run: Path, evaluation: Mapping[str, Any]) -> str:
    """Return reconstructions and the tokenizer's training curves."""
    codes = TokenShards(run / "shards").codes
    rows = read_metrics(run / "tokenizer")
    charts = [
        chart(rows, [("psnr_db", "training batches"), ("validation_psnr_db", "held out")],
               "PSNR (dB)", "Reconstruction in the tokenizer's training"),
        chart(rows, [("codes_used", "codes used in a batch")], "fraction of the codebook",
               "Use of the codebook in the tokenizer's training"),
    ]  # fmt: skip
    picture = run / "evaluation" / evaluation["pictures"]["reconstructions"]
    return f"""<h2>Frames become codes</h2>
<p>The tokenizer turns a frame into {codes.grid_height}&times;{codes.grid_width} codes out of
{codes.vocab_size:,}, and codes back into a frame. What it loses here, no model can bring back.</p>
{
        sheet(
            read(picture),
            "Held-out frames above, their reconstructions below.",
            "Above: held-out frames. Below: the same after encoding and decoding.",
        )
    }
<div class="pair">{"".join(charts)}</div>
"""


def _dynamics(run: Path) -> str:
    """Return the dynamics' training curves."""
    rows = read_metrics(run / "dynamics")
    charts = [
        chart(rows, [("loss", "training"), ("validation_loss", "held out")], "nats per code",
              "Loss in the dynamics' training"),
        chart(rows, [("free_running_accuracy", "free-running"), ("copy_accuracy", "copying"),
                     ("validation_accuracy", "given the true past")],
              "fraction of codes right", "Accuracy in the dynamics' training, held out"),
    ]  # fmt: skip
    return f"""<h2>Codes become a world</h2>
<p>A transformer learns to predict the codes of the next frame from the frames and the actions
before it. It never sees a pixel.</p>
<div class="pair">{"".join(charts)}</div>
"""


def _held(run: Path, evaluation: Mapping[str, Any]) -> str:
    """Return one moving picture for each action held down."""
    pictures = []
    for held in evaluation["pictures"]["held"]:
        name = html.escape(held["action"])
        picture = moving(run / "evaluation", held, alt=f"Generated frames while {name} is held.")
        pictures.append(f"<figure>{picture}<figcaption>{name}</figcaption></figure>")
    if not pictures:
        return ""
    return f"""<h2>One key held down</h2>
<p>Generated from the same start and the same seed; only the action differs.</p>
<div class="held">{"".join(pictures)}</div>
"""


def _rollouts(run: Path, evaluation: Mapping[str, Any]) -> str:
    """Return rollouts frame by frame, and how they drift."""
    curves = evaluation["rollout"]["per_frame"]
    steps = range(1, len(curves["model_db"]) + 1)
    names = [
        ("model_db", "true actions", False), ("random_db", "random actions", False),
        ("reconstruction_db", "reconstruction (bound)", True),
        ("copy_db", "last frame repeated", True),
    ]  # fmt: skip
    curve = chart_svg(
        [Line(name=name, x=steps, y=curves[key], dashed=dashed) for key, name, dashed in names],
        x_label="generated frame",
        y_label="PSNR to the true frame (dB)",
        describe="PSNR of rollouts by frame, for true and random actions, with the bound that "
        "reconstruction sets and the baseline of repeating the last frame",
        width=8.0,
    )
    sheets = "".join(
        sheet(
            read(run / "evaluation" / rollout["png"]),
            "True frames above generated ones, each under the action that led to it.",
            ""
            if number
            else "Above: what happened. Below: generated. Over each frame the action "
            "that led to it.",
        )
        for number, rollout in enumerate(evaluation["pictures"]["rollouts"])
    )
    return f"""<h2>Frame by frame</h2>
<p>The same actions as in the recording; the model continues from its own frames.</p>
{sheets}
<figure class="chart">{curve}</figure>
"""


def _time(seconds: Mapping[str, float]) -> str:
    """Return how long each stage took."""
    total = sum(seconds.values()) or 1.0
    stages = bars([(name, value / total, duration(value)) for name, value in seconds.items()])
    return f"""<h2>Where the time went</h2>
<p>{duration(sum(seconds.values()))} in all.</p>
<div style="max-width:42rem">{stages}</div>
"""


def _again(commands: Sequence[str], env: Mapping[str, Any], next_steps: str) -> str:
    """Return how to make all of this again, and with what it was made."""
    versions = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(version))}</td></tr>'
        for name, version in sorted(env["versions"].items())
        if version is not None
    )
    return f"""<h2>Make it again</h2>
<pre><code>{html.escape(chr(10).join(commands))}</code></pre>
{f"<p>{html.escape(next_steps)}</p>" if next_steps else ""}
<details><summary>Versions</summary>
<table><tbody><tr><th scope="row">Python</th><td>{html.escape(str(env["python"]))}</td></tr>
<tr><th scope="row">platform</th><td>{html.escape(str(env["platform"]))}</td></tr>
{versions}</tbody></table></details>
<footer>Made by worldloom. The numbers are also in report.json, beside this page.</footer>
"""
