"""What every part of the dynamics model is worth: one changed at a time, at equal updates.

    python benchmarks/ablations.py --shards runs/demo/shards --json ablations.json
    python benchmarks/ablations.py --shards runs/demo/shards --only head order

Trains a small model (4 layers of 128; `--updates` and `--windows` say how long) on token shards,
those of `make demo` if none others are at hand, with the defaults of DynamicsConfig and
DynamicsTrainingConfig ("base") and with one of them changed, for every seed. Stated are, on
windows of 16 frames of held-out episodes, the same ones for all:

    cross-entropy    nats a code, given the true past
    first frame      share of the codes of the first generated frame that are the true ones, after
                     a prompt of 8 frames; what repeating the prompt's last frame scores is beside
                     the table
    after 8 frames   the same of the eighth generated frame
    ms/update        the median over the run, by the clock: measure on a quiet machine

as the median over the seeds with the least and the greatest, and how far the mean over the seeds
is from base ("- base"): of one seed, all variants see the same windows in the same order.

Every run is written to the --json file when it is done: the same command again goes on behind the
last one. Seeds are the outer loop, so a third of the time gives the whole table for one seed. The
order of the rows is that of VARIANTS; a variant that is the default is the base.

Tables go to stdout, progress to stderr.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from loader import write_corpus
from report import Report, arguments, spread
from worldloom.common import (
    TokenShards,
    describe_difference,
    fingerprint,
    read_metrics,
    say,
    to_plain,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsTrainingConfig,
    open_held_out,
    train_dynamics_model,
    validate,
)

HELD_OUT_FRAMES = 16
MODEL = DynamicsConfig(num_layers=4, dim=128, num_heads=4, context_frames=8)
TRAINING = DynamicsTrainingConfig(
    # One frame more than the context, so that every distance in time that sampling sees is trained.
    window_frames=MODEL.context_frames + 1,
    learning_rate=4e-3,
    warmup_steps=20,
    bf16=True,
    validate_every=1 << 30,  # at the end, once, whatever this says
    checkpoint_every=1 << 30,
    log_every=10,
)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "head": [{"head": head} for head in ("linear", "dot", "distance")],
    "positions": [
        {"cell_embedding": False},
        {"positions": "time"},
        {"positions": "time", "cell_embedding": False},  # genie2-pytorch's
    ],
    "order": [{"order": order} for order in ("frame", "row", "raster", "masked")],
    "previous_frame": [{"order": order, "previous_frame": False} for order in ("row", "raster")],
    "num_meta_tokens": [{"num_meta_tokens": number} for number in (0, 16)],
    "residual_streams": [{"residual_streams": number} for number in (1, 2, 4)],
    "value_residual": [{"value_residual": on} for on in (True, False)],
    "attention": [{"attention": kind} for kind in ("full", "factorised")],
    "action_input": [{"action_input": way} for way in ("added", "prepended")],
    "action_head": [{"action_head": on} for on in (False, True)],
    "corruption": [{"corruption": share} for share in (0.0, 0.1, 0.3)],
    "action_dropout": [{"action_dropout": share} for share in (0.0, 0.05, 0.2)],
    "optimizer": [
        {"optimizer": name, "learning_rate": rate}
        for name in ("adamw", "muon")
        for rate in (1e-3, 2e-3, 4e-3, 8e-3)
    ],
}
"""Group -> what is changed in each of its variants."""
SCORES = {
    "cross-entropy": "validation_loss",
    "first frame": "free_running_accuracy",
    "after 8 frames": "free_running_accuracy_at_8",
}
"""Column -> what `validate` calls it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model and a training, and how they differ from the base."""

    name: str
    model: DynamicsConfig
    training: DynamicsTrainingConfig

    @classmethod
    def of(
        cls, changed: Mapping[str, Any], model: DynamicsConfig, training: DynamicsTrainingConfig
    ) -> "Variant":
        """Change a base."""
        names = {field.name for field in fields(DynamicsConfig)}
        of_model = {name: value for name, value in changed.items() if name in names}
        of_training = {name: value for name, value in changed.items() if name not in names}
        return cls(
            ", ".join(f"{name} {_word(value)}" for name, value in changed.items()) or "base",
            replace(model, **of_model),
            replace(training, **of_training),
        )


def _word(value: object) -> str:
    """Return a setting as a person says it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def variants(
    groups: Sequence[str], model: DynamicsConfig, training: DynamicsTrainingConfig
) -> list[Variant]:
    """Return the base and the variants of some groups that are not the base again."""
    found = [Variant.of({}, model, training)]
    base = found[0]
    for group in groups:
        for changed in VARIANTS[group]:
            variant = Variant.of(changed, model, training)
            if (variant.model, variant.training) != (base.model, base.training):
                found.append(variant)
    return found


def measure(
    variant: Variant, shards: TokenShards, *, seed: int, held_out: int
) -> dict[str, float | int]:
    """Train a variant and return its numbers."""
    folder = Path(tempfile.mkdtemp(prefix="worldloom-"))
    try:
        trained = train_dynamics_model(
            shards,
            folder / "run",
            model=variant.model,
            training=replace(variant.training, seed=seed),
            cpu=True,
        )
        model = DynamicsModel.from_pretrained(trained)
        rows = read_metrics(folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    windows = open_held_out(shards, window_frames=HELD_OUT_FRAMES)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms_per_update": _ms_per_update(rows, variant.training, model.grid.cells),
        **validate(model, windows, seed=0, num_windows=held_out),
    }


def _ms_per_update(
    rows: Sequence[Mapping[str, Any]], training: DynamicsTrainingConfig, cells: int
) -> float:
    """Return the median over the stretches between two lines of the log."""
    predicted = training.batch_windows * (training.window_frames - 1) * cells
    steps, seconds = [0], [0.0]  # since the start, which is what the rate in the log is of
    for row in rows:
        if row.get("tokens_per_s"):
            steps.append(row["step"])
            seconds.append(row["step"] * predicted / row["tokens_per_s"])
    return 1e3 * median(
        (seconds[i] - seconds[i - 1]) / (steps[i] - steps[i - 1]) for i in range(1, len(steps))
    )


def earlier_runs(path: Path | None, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that the file holds already."""
    if path is None or not path.exists():
        return []
    table = json.loads(path.read_text())["tables"]["runs"]
    there = {name: value for name, value in table["settings"].items() if name != "seeds"}
    # A setting that did not exist then is one that does nothing unless asked for.
    here = {name: settings.get(name) for name in there}
    if there != here:
        raise SystemExit(
            f"{path}: holds runs of other settings ({describe_difference(there, here)}); go on "
            "with the same ones, or name another file"
        )
    rows: list[dict[str, Any]] = table["rows"]
    return rows


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a variant, the base first."""
    runs_of: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        runs_of.setdefault(run["variant"], {})[run["seed"]] = run
    base = runs_of["base"]
    rows = []
    for name, of_seed in runs_of.items():
        row: dict[str, Any] = {"variant": name}
        both = [seed for seed in of_seed if seed in base]
        for column, key in SCORES.items():
            if key in runs[0]:
                row[column] = spread([run[key] for run in of_seed.values()])
                row[f"- base ({column})"] = mean(of_seed[s][key] - base[s][key] for s in both)
        row["ms/update"] = spread([run["ms_per_update"] for run in of_seed.values()])
        row["parameters"] = next(iter(of_seed.values()))["parameters"]
        rows.append(row)
    return rows


def main() -> None:
    """Train what has not been trained yet, and print all that has."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="of `worldloom tokenize`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="GROUP",
                        default=list(VARIANTS), help="some of " + ", ".join(VARIANTS))  # fmt: skip
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--windows", type=int, default=16, help="per update")
    parser.add_argument("--held-out", type=int, default=128, help="windows to measure on")
    asked = parser.parse_args()
    if asked.shards is None and not asked.quick:
        parser.error("--shards: name a folder of token shards, such as runs/demo/shards")
    torch.set_num_threads(1)
    report = Report("ablations", quick=asked.quick, packages=("x-transformers",))
    model = MODEL
    training = replace(TRAINING, num_steps=asked.updates, batch_windows=asked.windows)
    if asked.quick:
        asked.seeds, asked.held_out = [0], 2
        model = replace(model, num_layers=2, dim=24, num_heads=2)
        training = replace(training, num_steps=2, batch_windows=2, log_every=1)
    wanted = variants(asked.only, model, training)
    with tempfile.TemporaryDirectory(prefix="worldloom-") as folder:
        if asked.shards is None:
            toys = {"shards": 1, "episodes": 4, "frames": 24, "grid": 2}
            shards = write_corpus(Path(folder) / "shards", **toys, seed=0)
        else:
            shards = TokenShards(asked.shards)
        settings = {
            "shards": fingerprint(shards.manifest, [])[:16],
            "held_out_windows": asked.held_out,
            **{f"model.{name}": value for name, value in to_plain(model).items()},
            **{f"training.{name}": value for name, value in to_plain(training).items()},
        }
        del settings["training.seed"]
        runs = earlier_runs(asked.json, settings)
        done = {(run["variant"], run["seed"]) for run in runs}
        pairs = [(variant, seed) for seed in asked.seeds for variant in wanted]
        todo = [(variant, seed) for variant, seed in pairs if (variant.name, seed) not in done]
        for number, (variant, seed) in enumerate(todo, 1):
            say(f"ablations: {number} of {len(todo)}: {variant.name}, seed {seed}")
            numbers = measure(variant, shards, seed=seed, held_out=asked.held_out)
            runs.append({"variant": variant.name, "seed": seed, **numbers})
            report.keep("runs", _same_columns(runs), settings=settings)
            report.write(asked.json)
    about = {
        "updates": training.num_steps,
        "windows": training.batch_windows,
        "seeds": sorted({run["seed"] for run in runs}),
        "first frame by copying": runs[0].get("copy_accuracy"),
    }
    report.table("runs", _same_columns(runs), settings=settings | {"seeds": about["seeds"]})
    report.table("ablations", summary(runs), settings=about)
    report.write(asked.json)


def _same_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that all have every column: only some models have an action head."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


if __name__ == "__main__":
    main()
