"""bind_shape: check a tensor against the letters in its name, once, where it enters.

    ("video", tensor, "B C T H W", C=3)  ->  {"B": 2, "C": 3, "T": 16, "H": 64, "W": 64}

Works on anything with a `.shape`: torch tensors and numpy arrays alike.
"""

from typing import Protocol

from .errors import ShapeError


class HasShape(Protocol):
    """A torch tensor, a numpy array, or anything else with a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        ...


def bind_shape(name: str, tensor: HasShape, letters: str, /, **known: int) -> dict[str, int]:
    """Return the length of every letter of `letters`, checked against `known` and each other.

    Args:
        name: what the tensor is called in the error.
        tensor: anything with a shape.
        letters: one word an axis, as in "B t h w".
        known: lengths that letters must have.

    Raises:
        ShapeError: naming the axis, the length found and the length wanted.
    """
    axes = letters.split()
    shape = tuple(tensor.shape)
    wanted = ", ".join(f"{axis}={known[axis]}" if axis in known else axis for axis in axes)
    if len(shape) != len(axes):
        raise ShapeError(
            f"{name}: expected ({wanted}), got shape {shape}: "
            f"{len(shape)} axes, must be {len(axes)}"
        )
    bound = dict(known)
    for axis, length in zip(axes, shape, strict=True):
        if bound.setdefault(axis, length) != length:
            raise ShapeError(
                f"{name}: expected ({wanted}), got shape {shape}: "
                f"{axis} is {length}, must be {bound[axis]}"
            )
    return bound
