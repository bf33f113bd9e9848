"""Dynamics: predict the next latent frame's codes from past codes and actions. Knows no pixels."""

from typing import TYPE_CHECKING

from worldloom.common import lazy_exports

if TYPE_CHECKING:
    from .actions import NULL as NULL
    from .config import DynamicsConfig as DynamicsConfig
    from .cost import Cost as Cost
    from .cost import measured_times_s as measured_times_s
    from .cost import training_cost as training_cost
    from .loading import open_held_out as open_held_out
    from .losses import cross_entropy as cross_entropy
    from .mixture import Mixture as Mixture
    from .mixture import check_alike as check_alike
    from .model import DynamicsModel as DynamicsModel
    from .rollout import Rollout as Rollout
    from .rollout import Snapshot as Snapshot
    from .rollout import fit_sampling as fit_sampling
    from .rollout import generate_codes as generate_codes
    from .sampling import sample_codes as sample_codes
    from .sampling_config import SamplingConfig as SamplingConfig
    from .sampling_config import decoders_of as decoders_of
    from .spec import DynamicsSpec as DynamicsSpec
    from .streaming import WindowStream as WindowStream
    from .training import train_dynamics_model as train_dynamics_model
    from .training_config import DynamicsTrainingConfig as DynamicsTrainingConfig
    from .training_config import StreamConfig as StreamConfig
    from .validation import validate as validate
    from .windows import WindowBatch as WindowBatch
    from .windows import Windows as Windows
    from .windows import WindowSource as WindowSource

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "actions": ("NULL",),
        "config": ("DynamicsConfig",),
        "cost": ("Cost", "measured_times_s", "training_cost"),
        "loading": ("open_held_out",),
        "losses": ("cross_entropy",),
        "mixture": ("Mixture", "check_alike"),
        "model": ("DynamicsModel",),
        "rollout": ("Rollout", "Snapshot", "fit_sampling", "generate_codes"),
        "sampling": ("sample_codes",),
        "sampling_config": ("SamplingConfig", "decoders_of"),
        "spec": ("DynamicsSpec",),
        "streaming": ("WindowStream",),
        "training": ("train_dynamics_model",),
        "training_config": ("DynamicsTrainingConfig", "StreamConfig"),
        "validation": ("validate",),
        "windows": ("WindowBatch", "WindowSource", "Windows"),
    },
)
