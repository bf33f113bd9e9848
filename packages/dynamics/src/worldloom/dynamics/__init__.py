"""Dynamics: predict the next latent frame's codes from past codes and actions. Knows no pixels."""

from typing import TYPE_CHECKING

from worldloom.common import lazy_exports

if TYPE_CHECKING:
    from .actions import NULL as NULL
    from .config import DynamicsConfig as DynamicsConfig
    from .config import DynamicsTrainingConfig as DynamicsTrainingConfig
    from .config import SamplingConfig as SamplingConfig
    from .losses import cross_entropy as cross_entropy
    from .model import DynamicsModel as DynamicsModel
    from .rollout import Rollout as Rollout
    from .rollout import Snapshot as Snapshot
    from .rollout import generate_codes as generate_codes
    from .sampling import sample_codes as sample_codes
    from .spec import DynamicsSpec as DynamicsSpec
    from .training import train_dynamics_model as train_dynamics_model
    from .validation import validate as validate
    from .windows import WindowBatch as WindowBatch
    from .windows import Windows as Windows

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "actions": ("NULL",),
        "config": ("DynamicsConfig", "DynamicsTrainingConfig", "SamplingConfig"),
        "losses": ("cross_entropy",),
        "model": ("DynamicsModel",),
        "rollout": ("Rollout", "Snapshot", "generate_codes"),
        "sampling": ("sample_codes",),
        "spec": ("DynamicsSpec",),
        "training": ("train_dynamics_model",),
        "validation": ("validate",),
        "windows": ("WindowBatch", "Windows"),
    },
)
