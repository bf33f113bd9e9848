"""How much of an update of the dynamics model is arithmetic, and who does it fastest?

    python benchmarks/arithmetic.py                                both tables
    python benchmarks/arithmetic.py --only products --threads 1    one alone

limit: how much of an update of the demo's model (preset `demo`) is arithmetic that has to be: its
matrix products alone, forward and backward, and its attention alone.

products: a product with weights and its gradients, in float32, by torch as it comes and by oneDNN
(onednn.py), of three sizes of weights: just below where ours asks oneDNN, just above, and a large
one. All are read from memory: as many matrices of a size take turns as a cache cannot hold.

All of a table take turns, after rounds that do not count; stated is the median over the rounds with
the least and the greatest, and ratios are taken within a round. CPU seconds are those of all
threads: on a busy machine they say more than the clock.

Tables go to stdout, progress to stderr.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from loader import write_corpus
from report import Report, arguments, spread
from torch import Tensor, nn
from turns import Times, ratios, take_turns, timed
from updates import Run, about, asked_of, in_both_types, type_name, updates_from_disk
from worldloom.dynamics import DynamicsConfig, DynamicsModel
from worldloom.dynamics.onednn import DifferentiableProduct
from worldloom.pipelines.settings import preset_path, read_settings, stage_config
from worldloom.pipelines.train_dynamics import TrainDynamicsConfig


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
    report.table(f"limit, {type_name(bf16)}", rows, settings=settings)


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


TABLES: dict[str, Callable[[Report, Any], None]] = {
    "limit": in_both_types(compare_with_limit),
    "products": compare_products,
}


def main() -> None:
    """Measure, print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    asked = asked_of(parser)
    report = Report("arithmetic", quick=asked.quick, packages=("x-transformers", "accelerate"))
    for name in asked.only:
        TABLES[name](report, asked)
        report.write(asked.json)


if __name__ == "__main__":
    main()
