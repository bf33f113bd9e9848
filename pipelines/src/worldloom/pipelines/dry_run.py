"""A fresh model and one forward of it -> what its training will take, before it is trained.

    model, forward of a few samples  ->  estimate  ->  DryRun: the numbers, one a line

Memory is measured where it can be: what the forward keeps for the backward pass is counted, for few
samples, and multiplied. The rest is arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from worldloom.common import say


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a training would take. As text: one `name value` a line."""

    parameters: int
    samples_per_update: int
    """Clips or windows."""
    items_per_update: int
    """Frames or tokens."""
    updates: int
    checkpoint_bytes: int
    """One checkpoint: weights, the optimizer's moments of each, and their average if any."""
    state_bytes: int
    """Weights, gradients, moments and average while training."""
    activation_bytes: int
    """What the forward of as many samples as are computed at once keeps for the backward pass."""

    @property
    def memory_bytes(self) -> int:
        """An estimate of the memory that training needs on its device."""
        return self.state_bytes + self.activation_bytes

    def __str__(self) -> str:
        """Return what a program can read: `parameters 123`, and so on."""
        names = [field.name for field in fields(self)] + ["memory_bytes"]
        return "\n".join(f"{name} {getattr(self, name)}" for name in names)


def estimate(  # noqa: PLR0913 - the two trainings differ in just these
    model: nn.Module,
    forward: Callable[[], Tensor],
    /,
    *,
    probe: int = 1,
    at_once: int | None = None,
    samples: int,
    items: int,
    updates: int,
    sample: str,
    item: str,
    moment_bytes: int | None = None,
    beside: nn.Module | None = None,
    averaged: bool = False,
) -> DryRun:
    """Measure one forward, say what training will take, and return it.

    Args:
        model: with fresh weights.
        forward: runs it as training does, on few samples, and returns what the loss comes from.
        probe: how many samples those are.
        at_once: how many samples a forward of the training has; all of an update if not given.
        samples: per update.
        items: per update, counted as people count them.
        updates: in all.
        sample: what a sample is called: "clip".
        item: what an item is called: "frame".
        moment_bytes: what the model's optimizer remembers; AdamW's two moments if not given.
        beside: a second network that is trained with it, if any, and saved in checkpoints.
        averaged: whether an average of the model's weights is kept.
    """
    at_once = at_once or samples
    networks = [model] if beside is None else [model, beside]
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameter_bytes = sum(p.nbytes for p in parameters)
    beside_bytes = 0 if beside is None else sum(p.nbytes for p in beside.parameters())
    moment_bytes = 2 * parameter_bytes if moment_bytes is None else moment_bytes
    held_bytes = sum(tensor.nbytes for n in networks for tensor in n.state_dict().values())
    average_bytes = parameter_bytes if averaged else 0
    checkpoint_bytes = held_bytes + moment_bytes + 2 * beside_bytes + average_bytes
    dry = DryRun(
        parameters=sum(p.numel() for p in parameters),
        samples_per_update=samples,
        items_per_update=items,
        updates=updates,
        checkpoint_bytes=checkpoint_bytes,
        state_bytes=checkpoint_bytes + parameter_bytes + beside_bytes,
        activation_bytes=at_once * _kept_bytes(networks, forward) // probe,
    )
    say(
        f"{dry.parameters / 1e6:.1f}M parameters; {updates:,} updates of {samples} {sample}s, "
        f"{items:,} {item}s each; a checkpoint is {size_text(dry.checkpoint_bytes)}, and two are "
        "kept"
    )
    say(
        f"memory: about {size_text(dry.memory_bytes)} while training, "
        f"{size_text(dry.state_bytes)} of it weights, gradients and the optimizer's moments, "
        f"{size_text(dry.activation_bytes)} what a forward keeps for the backward pass (counted on "
        f"{probe}, times {at_once / probe:g}). "
        "Python, the libraries and what they compute with come on top"
    )
    say("nothing was trained and nothing was written: this was a dry run")
    return dry


def _kept_bytes(networks: Sequence[nn.Module], forward: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward keeps for the backward pass, besides the networks' own."""
    own = {t.untyped_storage().data_ptr() for n in networks for t in n.state_dict().values()}
    # The storages themselves: what only a loss keeps is freed at once here, for forward returns
    # none, and an address that was given back could be counted as another's.
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def size_text(size_bytes: int) -> str:
    """Return a size as people say it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / 1e3:.0f} kB"
