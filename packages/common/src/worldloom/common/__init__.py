"""What both halves share: specs, actions, files, seeds, checkpoints. No pixels, no models.

Nothing here imports torch until a name that needs it is touched.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_exports as lazy_exports

if TYPE_CHECKING:
    from .actions import ActionArray as ActionArray
    from .actions import ActionSpec as ActionSpec
    from .actions import SlotArray as SlotArray
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import load_checkpoint as load_checkpoint
    from .checkpoint import load_model as load_model
    from .checkpoint import load_weights as load_weights
    from .checkpoint import newest_checkpoint as newest_checkpoint
    from .checkpoint import save_checkpoint as save_checkpoint
    from .checkpoint import save_model as save_model
    from .config import build as build
    from .config import describe_difference as describe_difference
    from .config import nearest as nearest
    from .config import partial as partial
    from .config import read_toml as read_toml
    from .config import to_plain as to_plain
    from .ema import WeightAverage as WeightAverage
    from .episodes import Episode as Episode
    from .episodes import Episodes as Episodes
    from .episodes import EpisodeWriter as EpisodeWriter
    from .episodes import Frames as Frames
    from .episodes_spec import EpisodesSpec as EpisodesSpec
    from .episodes_spec import check_key as check_key
    from .errors import ConfigError as ConfigError
    from .errors import FormatError as FormatError
    from .errors import MismatchError as MismatchError
    from .errors import ShapeError as ShapeError
    from .errors import StorageError as StorageError
    from .errors import TrainingError as TrainingError
    from .errors import WorldloomError as WorldloomError
    from .files import atomic_folder as atomic_folder
    from .files import failpoint as failpoint
    from .files import file_sha256 as file_sha256
    from .files import is_leftover as is_leftover
    from .files import parse_json as parse_json
    from .files import read_json as read_json
    from .files import read_limited as read_limited
    from .files import remove_leftovers as remove_leftovers
    from .files import storage_errors as storage_errors
    from .files import to_json as to_json
    from .files import write_atomic as write_atomic
    from .files import write_bytes as write_bytes
    from .files import write_json as write_json
    from .interrupt import Interrupt as Interrupt
    from .muon import Muon as Muon
    from .npy import npy_array as npy_array
    from .npy import npy_bytes as npy_bytes
    from .optimizer import decay_groups as decay_groups
    from .optimizer import load_optimizer as load_optimizer
    from .optimizer import optimizer_tensors as optimizer_tensors
    from .optimizer import set_learning_rate as set_learning_rate
    from .optimizer import warmup_cosine as warmup_cosine
    from .optimizer import warmup_stable_decay as warmup_stable_decay
    from .rng import derive_seed as derive_seed
    from .rng import library_seed as library_seed
    from .rng import numpy_stream as numpy_stream
    from .rng import stream as stream
    from .runlog import RunLog as RunLog
    from .runlog import environment as environment
    from .runlog import format_metrics as format_metrics
    from .runlog import progress as progress
    from .runlog import read_metrics as read_metrics
    from .runlog import say as say
    from .shapes import bind_shape as bind_shape
    from .shard_reader import TokenShards as TokenShards
    from .shard_stream import stream_episodes as stream_episodes
    from .shards import CodeArray as CodeArray
    from .shards import EpisodeRecord as EpisodeRecord
    from .shards import ShardRecord as ShardRecord
    from .shards import TokenEpisode as TokenEpisode
    from .shards import finished_shard as finished_shard
    from .shards import shard_bytes as shard_bytes
    from .shards import shard_name as shard_name
    from .shards import write_manifest as write_manifest
    from .shards import write_shard as write_shard
    from .specs import CodeSpec as CodeSpec
    from .specs import ResizeRule as ResizeRule
    from .specs import TokenizerSpec as TokenizerSpec
    from .specs import fingerprint as fingerprint

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "actions": ("ActionArray", "ActionSpec", "SlotArray"),
        "checkpoint": (
            "Checkpoint", "load_checkpoint", "load_model", "load_weights", "newest_checkpoint",
            "save_checkpoint", "save_model",
        ),
        "config": ("build", "describe_difference", "nearest", "partial", "read_toml", "to_plain"),
        "ema": ("WeightAverage",),
        "episodes": ("Episode", "EpisodeWriter", "Episodes", "Frames"),
        "episodes_spec": ("EpisodesSpec", "check_key"),
        "errors": (
            "ConfigError", "FormatError", "MismatchError", "ShapeError", "StorageError",
            "TrainingError", "WorldloomError",
        ),
        "files": (
            "atomic_folder", "failpoint", "file_sha256", "is_leftover", "parse_json", "read_json",
            "read_limited",
            "remove_leftovers", "storage_errors", "to_json", "write_atomic", "write_bytes",
            "write_json",
        ),
        "interrupt": ("Interrupt",),
        "lazy": ("lazy_exports",),
        "muon": ("Muon",),
        "npy": ("npy_array", "npy_bytes"),
        "optimizer": (
            "decay_groups", "load_optimizer", "optimizer_tensors", "set_learning_rate",
            "warmup_cosine", "warmup_stable_decay",
        ),
        "rng": ("derive_seed", "library_seed", "numpy_stream", "stream"),
        "runlog": (
            "RunLog", "environment", "format_metrics", "progress", "read_metrics", "say",
        ),
        "shapes": ("bind_shape",),
        "shard_reader": ("TokenShards",),
        "shard_stream": ("stream_episodes",),
        "shards": (
            "CodeArray", "EpisodeRecord", "ShardRecord", "TokenEpisode", "finished_shard",
            "shard_bytes", "shard_name",
            "write_manifest", "write_shard",
        ),
        "specs": ("CodeSpec", "ResizeRule", "TokenizerSpec", "fingerprint"),
    },
)  # fmt: skip
