"""How long an update of the dynamics model takes, beside others of the same size.

    python benchmarks/train_step.py                            all tables
    python benchmarks/train_step.py --only genie2 --threads 2  one alone

genie2: a training step of PyPI's genie2-pytorch (the model whose recipe ours is) as its README has
it: 12 layers of 512, 51.6M parameters, 2 windows of 3 frames of 2x2 latents of 768 channels. It is
installed into a folder of its own (`--peer FOLDER` keeps it) and runs in a process of its own; its
import of imagen_pytorch, which would need the network, finds an empty module. Its step: latents ->
quantizer, whose codebook learns too -> forward -> losses of codes, quantizer and actions ->
backward -> AdamW (fused). Ours: codes of as many windows of that size -> disturbance -> forward ->
losses -> backward -> norm of the gradients, checked -> AdamW (fused), in three forms: built as
theirs is (raster order, 4 residual streams, distance head, time positions, action head), the same
with one stream, and the model with our defaults. Theirs comes without an optimizer and a loop: both
have the same one, neither clips, and both make their gradients anew at every step. Ours has tables
that theirs lacks (a vector per code, a linear head); so its feed-forward layers are narrower, and
no form has more parameters than theirs, nor 2% fewer.

muon: one step of ours by Muon, our default optimizer, beside one of theirs by AdamW. What Muon
costs an update depends on the model alone, and so few tokens do not pay for it.

decoder: the whole loop of `worldloom train-dynamics` (windows from shards on disk, disturbance,
losses, clipping, optimizer) against a bare x-transformers Decoder of the same width, depth, heads
and feed-forward (GLU, RMSNorm, rotary, flash attention) with a table of codes in front and a matrix
behind, on next codes held in memory, unclipped, by AdamW (fused). Windows of 16 frames x 64 codes.
Counted are predicted codes.

options: an update of the small model of ablations.py, one option changed at a time.

All of a table take turns, after rounds that do not count; stated is the median over the rounds with
the least and the greatest, and ratios are taken within a round. CPU seconds are those of all
threads: on a busy machine they say more than the clock.

Tables go to stdout, progress to stderr.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablations import MODEL, TRAINING, VARIANTS, variants
from loader import write_corpus
from peers import genie2
from report import Report, arguments, spread
from torch import Tensor, nn
from turns import Times, ratios, take_turns, timed
from updates import (
    Run,
    Updates,
    about,
    asked_of,
    in_both_types,
    num_parameters,
    type_name,
    updates_from_disk,
)
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    TokenizerSpec,
    decay_groups,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsSpec,
    DynamicsTrainingConfig,
    WindowBatch,
)
from x_transformers import Decoder


def forms_of_ours() -> dict[str, tuple[DynamicsConfig, DynamicsTrainingConfig]]:
    """Return ours as genie2-pytorch is, and as it is by itself; all about as large as that."""
    defaults = DynamicsConfig(
        num_layers=genie2.DEPTH,
        dim=genie2.DIM,
        num_heads=genie2.HEADS,
        ff_mult=3.625,
        context_frames=genie2.FRAMES,
    )
    theirs = replace(
        defaults,
        ff_mult=3.0625,
        order="raster",
        num_meta_tokens=16,
        action_head=True,
        head="distance",
        positions="time",
        cell_embedding=False,
        previous_frame=False,
        residual_streams=4,
    )
    training = DynamicsTrainingConfig(
        batch_windows=genie2.BATCH,
        window_frames=genie2.FRAMES,
        learning_rate=1e-4,
        optimizer="adamw",
        clip=0.0,
    )
    return {
        "ours, built as theirs": (theirs, training),
        "the same, 1 residual stream": (replace(theirs, residual_streams=1), training),
        "ours, defaults": (defaults, training),
    }


def compare_with_genie2(report: Report, asked: Any) -> None:
    """Print the table `genie2`."""
    race(report, asked, "genie2", forms_of_ours())


def compare_muon(report: Report, asked: Any) -> None:
    """Print the table `muon`."""
    config, training = forms_of_ours()["ours, defaults"]
    forms = {"ours, defaults, by Muon": (config, replace(training, optimizer="muon"))}
    asked = Namespace(**{**vars(asked), "rounds": 1, "steps": 1, "warm": 1})
    race(report, asked, "muon", forms)


def race(
    report: Report,
    asked: Any,
    table: str,
    forms: dict[str, tuple[DynamicsConfig, DynamicsTrainingConfig]],
) -> None:
    """Print a table of forms of ours beside genie2-pytorch."""
    codes = CodeSpec(
        vocab_size=genie2.CODEBOOK_SIZE,
        grid_height=genie2.SIDE,
        grid_width=genie2.SIDE,
        code_dim=genie2.CHANNELS,
    )
    actions = ActionSpec.discrete([f"action {i}" for i in range(genie2.NUM_ACTIONS)])
    spec = random_spec(codes, actions)
    rng = torch.Generator().manual_seed(asked.seed)
    shape = (genie2.BATCH, *codes.codes_shape(genie2.FRAMES))
    windows = WindowBatch(
        codes_Bthw=torch.randint(codes.vocab_size, shape, generator=rng),
        slots_BTA=torch.randint(genie2.NUM_ACTIONS, (*shape[:1], shape[1] - 1, 1), generator=rng),
        valid_Bt=torch.ones(shape[:2], dtype=torch.bool),
    )
    codebook_VZ = torch.randn(codes.vocab_size, codes.code_dim, generator=rng).numpy()
    with ExitStack() as stack:
        folder = asked.peer or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        genie2.install(folder)
        peer = genie2.Genie2Process(folder, threads=asked.threads, seed=asked.seed)
        contenders: dict[str, Run] = {genie2.NAME: stack.enter_context(peer)}
        sizes = [peer.num_parameters]
        for name, (config, training) in forms.items():
            model = DynamicsModel(config, spec, codebook_VZ, seed=asked.seed)
            contenders[name] = Updates(model, training, lambda: windows)
            sizes.append(num_parameters(model))
            if not 0.98 * sizes[0] <= sizes[-1] <= sizes[0]:
                raise SystemExit(
                    f"train_step: {name} has {sizes[-1]} parameters beside the {sizes[0]} of "
                    f"{genie2.NAME}, must be at most as many and at most 2% fewer; change its "
                    "ff_mult in forms_of_ours"
                )
        found = take_turns(contenders, rounds=asked.rounds, steps=asked.steps, warm=asked.warm)
    theirs = found[genie2.NAME]
    rows = [
        {
            "a step of": name,
            "parameters": f"{size / 1e6:.1f}M",
            "ms": spread([1e3 * t.wall_s for t in times]),
            "times as fast": ratios([t.wall_s for t in theirs], [t.wall_s for t in times]),
            "CPU-ms": spread([1e3 * t.cpu_s for t in times]),
            "in CPU time": ratios([t.cpu_s for t in theirs], [t.cpu_s for t in times]),
        }
        for (name, times), size in zip(found.items(), sizes, strict=True)
    ]
    settings = {**about(asked), "windows": genie2.BATCH, "frames": genie2.FRAMES}
    report.table(table, rows, settings={**settings, "cells": genie2.SIDE**2, "type": "float32"})


def random_spec(codes: CodeSpec, actions: ActionSpec) -> DynamicsSpec:
    """Return what a model is told of codes that no tokenizer made."""
    tokenizer = TokenizerSpec(
        name="random",
        codes=codes,
        height=8 * codes.grid_height,
        width=8 * codes.grid_width,
        resize="exact",
        fps=8.75,
        frame_skip=4,
        compute_dtype="float32",
        fingerprint="0" * 64,
    )
    return DynamicsSpec(tokenizer=tokenizer, actions=actions, fps=8.75, frame_skip=4)


class BareDecoder(nn.Module):
    """x-transformers' Decoder between a table and a matrix: next-code prediction, nothing else."""

    def __init__(self, config: DynamicsConfig, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, config.dim)
        self.decoder = Decoder(
            dim=config.dim,
            depth=config.num_layers,
            heads=config.num_heads,
            attn_dim_head=config.dim // config.num_heads,
            ff_mult=config.ff_mult,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            use_rmsnorm=True,
            rotary_pos_emb=True,
            attn_flash=True,
        )
        self.to_logits = nn.Linear(config.dim, vocab_size)

    def forward(self, codes_BL: Tensor, /) -> Tensor:
        """Return the mean cross-entropy of every code but the first."""
        logits_BLV = self.to_logits(self.decoder(self.table(codes_BL[:, :-1])))
        return nn.functional.cross_entropy(
            logits_BLV.float().flatten(0, 1), codes_BL[:, 1:].flatten()
        )


class BareUpdates:
    """Updates of the bare decoder on codes in memory."""

    def __init__(self, model: BareDecoder, codes_NBL: Tensor, *, bf16: bool) -> None:
        self.model = model
        self.codes_NBL = codes_NBL
        self.bf16 = bf16
        groups = decay_groups(model, weight_decay=0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.step = 0

    def __call__(self, steps: int) -> Times:
        """Do a round."""
        return timed(self._update, steps)

    def _update(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.codes_NBL[self.step % len(self.codes_NBL)])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


def compare_with_decoder(report: Report, asked: Any, *, bf16: bool) -> None:
    """Print a table `decoder`."""
    config = DynamicsConfig(num_layers=6, dim=384, num_heads=6, context_frames=16)
    windows, frames, side = 4, 16, 8
    if asked.quick:
        config, frames, side = replace(config, num_layers=1, dim=48, num_heads=2), 6, 2
    training = DynamicsTrainingConfig(batch_windows=windows, window_frames=frames, bf16=bf16)
    forms = {"ours, AdamW": replace(training, optimizer="adamw"), "ours, defaults": training}
    cells = side * side
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shards"
        corpus = {"shards": 2, "episodes": 4, "frames": 100, "grid": side}
        shards = write_corpus(folder, **corpus, seed=asked.seed)
        rng = torch.Generator().manual_seed(asked.seed)
        vocab_size = shards.codes.vocab_size
        codes_NBL = torch.randint(vocab_size, (8, windows, frames * cells), generator=rng)
        torch.manual_seed(asked.seed)
        bare = BareDecoder(config, vocab_size)
        contenders: dict[str, Run] = {"bare decoder": BareUpdates(bare, codes_NBL, bf16=bf16)}
        sizes, predicted = [num_parameters(bare)], [frames * cells - 1]
        for name, form in forms.items():
            ours = stack.enter_context(updates_from_disk(shards, config, form, seed=asked.seed))
            contenders[name] = ours
            sizes.append(num_parameters(ours.learner.dynamics))
            predicted.append((frames - 1) * cells)
        found = take_turns(contenders, rounds=asked.rounds, steps=asked.steps, warm=asked.warm)
    rates = {
        name: [(windows * codes / t.wall_s, windows * codes / t.cpu_s) for t in times]
        for (name, times), codes in zip(found.items(), predicted, strict=True)
    }
    rows = [
        {
            "updates of": name,
            "parameters": f"{size / 1e6:.1f}M",
            "codes/s": spread([wall for wall, _ in own]),
            "ratio": ratios([wall for wall, _ in own], [r[0] for r in rates["bare decoder"]]),
            "codes/CPU-s": spread([cpu for _, cpu in own]),
            "in CPU time": ratios([cpu for _, cpu in own], [r[1] for r in rates["bare decoder"]]),
        }
        for (name, own), size in zip(rates.items(), sizes, strict=True)
    ]
    settings = {**about(asked), "windows": windows, "frames": frames, "cells": cells}
    report.table(f"decoder, {type_name(bf16)}", rows, settings={**settings, "dim": config.dim})


def compare_options(report: Report, asked: Any) -> None:
    """Print the table `options`."""
    model, training = MODEL, replace(TRAINING, batch_windows=16)
    if asked.quick:
        model = replace(model, num_layers=2, dim=24, num_heads=2)
        training = replace(training, batch_windows=2)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shards"
        shards = write_corpus(folder, shards=2, episodes=8, frames=100, grid=4, seed=asked.seed)
        groups = [group for group in VARIANTS if group not in ("corruption", "action_dropout")]
        wanted = {
            variant.name: stack.enter_context(
                updates_from_disk(shards, variant.model, variant.training, seed=asked.seed)
            )
            for variant in variants(groups, model, training)
            # One learning rate costs what another does.
            if variant.training.learning_rate == training.learning_rate
        }
        found = take_turns(wanted, rounds=asked.rounds, steps=asked.steps, warm=asked.warm)
    base = found["base"]
    rows = [
        {
            "update of": name,
            "ms": spread([1e3 * t.wall_s for t in times]),
            "CPU-ms": spread([1e3 * t.cpu_s for t in times]),
            "times base": ratios([t.cpu_s for t in times], [t.cpu_s for t in base]),
        }
        for name, times in found.items()
    ]
    settings = {**about(asked), "windows": training.batch_windows, "type": type_name(training.bf16)}
    report.table("options", rows, settings=settings)


TABLES: dict[str, Callable[[Report, Any], None]] = {
    "genie2": compare_with_genie2,
    "muon": compare_muon,
    "decoder": in_both_types(compare_with_decoder),
    "options": compare_options,
}


def main() -> None:
    """Measure, print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=list(TABLES),
                        help="all; of a --quick run all that need no network")  # fmt: skip
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="keep genie2-pytorch there")
    asked = asked_of(parser)
    packages = ("x-transformers", "accelerate", "vector-quantize-pytorch")
    report = Report("train_step", quick=asked.quick, packages=packages)
    local = [name for name in TABLES if name not in ("genie2", "muon")]
    names = asked.only or (list(TABLES) if asked.peer or not asked.quick else local)
    for name in names:
        TABLES[name](report, asked)
        report.write(asked.json)


if __name__ == "__main__":
    main()
