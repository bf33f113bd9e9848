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

limit: how much of an update of the demo's model (preset `demo`) is arithmetic that has to be: its
matrix products alone, forward and backward, and its attention alone.

products: a product with weights and its gradients, in float32, by torch as it comes and by oneDNN
(onednn.py), of three sizes of weights: just below where ours asks oneDNN, just above, and a large
one. All are read from memory: as many matrices of a size take turns as a cache cannot hold.

options: an update of the small model of ablations.py, one option changed at a time.

All of a table take turns, after rounds that do not count; stated is the median over the rounds with
the least and the greatest, and ratios are taken within a round. CPU seconds are those of all
threads: on a busy machine they say more than the clock.

Tables go to stdout, progress to stderr.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch
from ablations import MODEL, TRAINING, VARIANTS, variants
from accelerate import Accelerator
from loader import write_corpus
from peers import genie2
from report import Report, arguments, spread
from torch import Tensor, nn
from turns import Times, ratios, take_turns, timed
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    TokenizerSpec,
    TokenShards,
    decay_groups,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsSpec,
    DynamicsTrainingConfig,
    WindowBatch,
    Windows,
)
from worldloom.dynamics.disturbance import disturb, mask_cells
from worldloom.dynamics.learner import Learner
from worldloom.dynamics.loading import Ahead
from worldloom.dynamics.onednn import DifferentiableProduct
from worldloom.pipelines.settings import preset_path, read_settings, stage_config
from worldloom.pipelines.train_dynamics import TrainDynamicsConfig
from x_transformers import Decoder

Run = Callable[[int], Times]


class Updates:
    """Our updates, as training.py does them."""

    def __init__(
        self,
        model: DynamicsModel,
        training: DynamicsTrainingConfig,
        next_batch: Callable[[], WindowBatch],
    ) -> None:
        self.training = training
        self.next_batch = next_batch
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.learner = Learner(model, None, training=training, accelerator=accelerator)
        self.vocab_size = model.spec.tokenizer.codes.vocab_size

    def __call__(self, steps: int) -> Times:
        """Do a round."""
        return timed(self._update, steps)

    def _update(self) -> None:
        batch = self.next_batch()
        step, rows = self.learner.step, range(len(batch.valid_Bt))
        fed = disturb(batch, self.training, vocab_size=self.vocab_size, step=step, rows=rows)
        if self.learner.dynamics.grid.refines:
            fed = mask_cells(fed, self.training, step=step, rows=rows)
        update = self.learner.gradients(batch, fed)
        if not update.is_finite():
            raise SystemExit("train_step: the loss is no longer finite; nothing was measured")
        self.learner.apply()


@contextmanager
def updates_from_disk(
    shards: TokenShards, config: DynamicsConfig, training: DynamicsTrainingConfig, *, seed: int
) -> Iterator[Updates]:
    """Lend updates whose windows a thread reads from shards, one batch ahead."""
    model = DynamicsModel(config, DynamicsSpec.of(shards), shards.codebook_VZ(), seed=seed)
    windows = Windows(shards, "train", window_frames=training.window_frames)
    with Ahead(windows, count(), size=training.batch_windows, seed=seed) as ahead:
        yield Updates(model, training, lambda: ahead.next().to("cpu"))


def num_parameters(model: nn.Module) -> int:
    """Count what is learned."""
    return sum(p.numel() for p in model.parameters())


def about(asked: Any) -> dict[str, Any]:
    """Return what every table was made with."""
    return {name: getattr(asked, name) for name in ("seed", "threads", "rounds", "steps")}


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
    report.table(f"decoder, {_type(bf16)}", rows, settings={**settings, "dim": config.dim})


def _type(bf16: bool) -> str:
    return "bf16" if bf16 else "float32"


def in_both_types(table: Callable[..., None]) -> Callable[[Report, Any], None]:
    """Return what prints a table in float32 and one in bf16."""

    def print_both(report: Report, asked: Any) -> None:
        for bf16 in (False, True):
            table(report, asked, bf16=bf16)

    return print_both


def compare_with_limit(report: Report, asked: Any, *, bf16: bool) -> None:
    """Print a table `limit`."""
    table, where = read_settings(preset_path("demo"))["train_dynamics"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shards"
        shards = write_corpus(folder, shards=2, episodes=8, frames=100, grid=4, seed=asked.seed)
        preset = stage_config(
            TrainDynamicsConfig, table, where=where, shards=(folder,), output=folder / "run"
        )
        config, training = preset.model, replace(preset.training, bf16=bf16)
        if asked.quick:
            config, training = replace(config, num_layers=1), replace(training, batch_windows=2)
        ours = stack.enter_context(updates_from_disk(shards, config, training, seed=asked.seed))
        model = ours.learner.dynamics
        frames = training.window_frames - model.grid.first_frame
        length = config.num_meta_tokens + frames * model.grid.tokens
        shape = (training.batch_windows, length)
        dtype = torch.bfloat16 if bf16 else torch.float32
        products, attention = Products(model, shape, dtype), Attentions(config, shape)
        contenders: dict[str, Run] = {
            "an update": ours,
            "its matrix products alone": lambda steps: timed(products, steps),
            "its attention alone": lambda steps: timed(attention, steps),
        }
        found = take_turns(contenders, rounds=asked.rounds, steps=asked.steps, warm=asked.warm)
    operations = [products.operations + attention.operations, products.operations,
                  attention.operations]  # fmt: skip
    update = found["an update"]
    rows = [
        {
            "what": name,
            "ms": spread([1e3 * t.wall_s for t in times]),
            "CPU-ms": spread([1e3 * t.cpu_s for t in times]),
            "share of CPU time": ratios([t.cpu_s for t in times], [t.cpu_s for t in update]),
            "Gflop": number / 1e9,
            "Gflop/CPU-s": spread([number / 1e9 / t.cpu_s for t in times]),
        }
        for (name, times), number in zip(found.items(), operations, strict=True)
    ]
    settings = {**about(asked), "preset": "demo", "optimizer": training.optimizer}
    report.table(f"limit, {_type(bf16)}", rows, settings=settings)


class Products:
    """The matrix products of an update, forward and backward, on numbers that mean nothing."""

    def __init__(self, model: DynamicsModel, shape: tuple[int, int], dtype: torch.dtype) -> None:
        tokens = shape[0] * shape[1]
        self.matrices = [
            (torch.randn(tokens, layer.in_features, dtype=dtype),
             torch.randn(tokens, layer.out_features, dtype=dtype),
             layer.weight.detach().to(dtype))
            for part in (model.transformer, model.head)
            for layer in part.modules() if isinstance(layer, nn.Linear)
        ]  # fmt: skip
        self.operations = sum(6 * tokens * weight.numel() for *_, weight in self.matrices)

    def __call__(self) -> None:
        """Compute them."""
        for fed, gradient, weight in self.matrices:
            nn.functional.linear(fed, weight)
            gradient @ weight
            gradient.T @ fed


class Attentions:
    """The attention of an update, forward and backward, every token seeing all."""

    def __init__(self, config: DynamicsConfig, shape: tuple[int, int]) -> None:
        batch, tokens = shape
        self.num_layers = config.num_layers
        size = (batch, config.num_heads, tokens, config.dim // config.num_heads)
        self.parts = [torch.randn(size).requires_grad_() for _ in range(3)]
        self.gradient = torch.randn(size)
        # Two products forward; their four gradients, and the first once more, backward.
        self.operations = 7 * 2 * batch * tokens**2 * config.dim * config.num_layers

    def __call__(self) -> None:
        """Compute it."""
        for _ in range(self.num_layers):
            seen = nn.functional.scaled_dot_product_attention(*self.parts)
            torch.autograd.grad(seen, self.parts, self.gradient)


def compare_products(report: Report, asked: Any) -> None:
    """Print the table `products`."""
    rows = []
    drawn = partial(torch.randn, generator=torch.Generator().manual_seed(asked.seed))
    for inputs, outputs in ((192, 1280), (512, 512), (512, 3712)):
        count = 1 if asked.quick else max(1, 2**26 // (4 * inputs * outputs))
        weights = [nn.Parameter(drawn(outputs, inputs)) for _ in range(count)]
        for tokens in (64,) if asked.quick else (16, 64, 256, 1024, 4096):
            fed, gradient = drawn(tokens, inputs), drawn(tokens, outputs)
            ways = {
                "torch": OneProduct(nn.functional.linear, weights, fed, gradient),
                "oneDNN": OneProduct(learned_product, weights, fed, gradient),
            }
            steps = 1 if asked.quick else max(3, 2**15 // tokens // 32)
            found = take_turns(ways, rounds=asked.rounds, steps=steps, warm=asked.warm)
            torchs, own = found["torch"], found["oneDNN"]
            rows.append({
                "weights": f"{outputs} x {inputs}",
                "tokens": tokens,
                "torch, ms": spread([1e3 * t.wall_s for t in torchs]),
                "oneDNN, ms": spread([1e3 * t.wall_s for t in own]),
                "times as fast": ratios([t.wall_s for t in torchs], [t.wall_s for t in own]),
            })  # fmt: skip
    settings = {name: getattr(asked, name) for name in ("seed", "threads", "rounds")}
    report.table("products", rows, settings={**settings, "type": "float32"})


def learned_product(fed: Tensor, weight: Tensor) -> Tensor:
    """Multiply as training does."""
    out: Tensor = DifferentiableProduct.apply(fed, weight, None)
    return out


class OneProduct:
    """A product and its gradients, each time with other weights."""

    def __init__(
        self,
        multiply: Callable[[Tensor, Tensor], Tensor],
        weights: list[nn.Parameter],
        fed: Tensor,
        gradient: Tensor,
    ) -> None:
        self.multiply, self.weights = multiply, cycle(weights)
        self.fed, self.gradient = fed.clone().requires_grad_(), gradient

    def __call__(self, steps: int) -> Times:
        """Do a round."""
        return timed(self._once, steps)

    def _once(self) -> None:
        weight = next(self.weights)
        torch.autograd.grad(self.multiply(self.fed, weight), (self.fed, weight), self.gradient)


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
    settings = {**about(asked), "windows": training.batch_windows, "type": _type(training.bf16)}
    report.table("options", rows, settings=settings)


TABLES: dict[str, Callable[[Report, Any], None]] = {
    "genie2": compare_with_genie2,
    "muon": compare_muon,
    "decoder": in_both_types(compare_with_decoder),
    "limit": in_both_types(compare_with_limit),
    "products": compare_products,
    "options": compare_options,
}


def main() -> None:
    """Measure, print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=list(TABLES),
                        help="all; of a --quick run all that need no network")  # fmt: skip
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="keep genie2-pytorch there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of every contender in a round")
    parser.add_argument("--warm", type=int, default=3, help="steps that do not count")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows")
    asked = parser.parse_args()
    if asked.quick:
        asked.rounds, asked.steps, asked.warm = 1, 1, 1
    torch.set_num_threads(asked.threads)
    packages = ("x-transformers", "accelerate", "vector-quantize-pytorch")
    report = Report("train_step", quick=asked.quick, packages=packages)
    local = [name for name in TABLES if name not in ("genie2", "muon")]
    names = asked.only or (list(TABLES) if asked.peer or not asked.quick else local)
    for name in names:
        TABLES[name](report, asked)
        report.write(asked.json)


if __name__ == "__main__":
    main()
