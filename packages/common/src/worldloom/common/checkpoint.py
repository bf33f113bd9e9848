"""Checkpoints and model directories: safetensors and JSON, whole or not at all, no pickle.

    tensors by group + state  -> save_checkpoint ->  RUN/checkpoints/step-00001000/{GROUP.safetensors, state.json, manifest.json}
    RUN                       -> newest_checkpoint -> the newest one whose every byte has the hash it should

    config + weights          -> save_model ->       FOLDER/{config.json, model.safetensors, README.md}
    FOLDER                    -> load_model ->       the same, checked

safetensors refuses torn files but loads a flipped payload bit; hence SHA-256 of every file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import FormatError, MismatchError
from .files import (
    atomic_folder,
    failpoint,
    file_sha256,
    read_json,
    remove_leftovers,
    to_json,
    write_bytes,
)

CHECKPOINT_SCHEMA = "worldloom.checkpoint/1"
MODEL_SCHEMA = "worldloom.model/1"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that training needs to go on."""

    path: Path
    step: int
    """Optimizer updates done."""
    tensors: dict[str, dict[str, Tensor]]
    """By group: "model", "optimizer", ..."""
    state: dict[str, Any]
    """JSON values: positions, schedules, seeds."""


def _write_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Write files into a temporary folder; return the size and hash of each."""
    table = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        failpoint("checkpoint-file")
        table[name] = {"size_bytes": len(content), "sha256": file_sha256(folder / name)}
    return table


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    /,
    *,
    keep: int = 2,
) -> Path:
    """Write RUN/checkpoints/step-%08d, then RUN/LATEST; keep the newest `keep`; return its path."""
    checkpoints = run / "checkpoints"
    folder = checkpoints / f"step-{step:08d}"
    with atomic_folder(folder) as temporary:
        files = {f"{name}.safetensors": save(_plain(group)) for name, group in tensors.items()}
        table = _write_files(temporary, {**files, "state.json": to_json(state).encode()})
        manifest = {"schema": CHECKPOINT_SCHEMA, "step": step, "files": table}
        (temporary / "manifest.json").write_text(to_json(manifest))
    failpoint("checkpoint-latest")
    write_bytes(run / "LATEST", f"checkpoints/{folder.name}\n".encode())
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        _remove(old)
    return folder


def newest_checkpoint(run: Path, /) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint of a run, and a sentence for each that was skipped."""
    checkpoints = run / "checkpoints"
    if not checkpoints.is_dir():
        return None, []
    remove_leftovers(checkpoints)
    skipped = []
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            return load_checkpoint(folder), skipped
        except FormatError as error:
            skipped.append(f"skipped a damaged checkpoint: {error}")
    return None, skipped


def load_checkpoint(folder: Path, /) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        FormatError: if a file is missing, or not of the size and hash its manifest says.
    """
    path = folder / "manifest.json"
    manifest = read_json(path, what="the manifest of a checkpoint")
    if manifest.get("schema") != CHECKPOINT_SCHEMA:
        raise FormatError(
            f"{path}: schema {manifest.get('schema')!r}, readable is {CHECKPOINT_SCHEMA}"
        )
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not isinstance(step, int) or "state.json" not in files:
        raise FormatError(f"{path}: lacks the table of files")
    for name, about in files.items():
        if name != Path(name).name:
            raise FormatError(f"{path}: file name {name!r:.60} must be a plain name")
        _check_hash(folder / name, about)
    tensors = {
        Path(name).stem: _load(folder / name) for name in files if name.endswith(".safetensors")
    }
    state = read_json(folder / "state.json", what="the state of a checkpoint")
    return Checkpoint(path=folder, step=step, tensors=tensors, state=state)


def save_model(
    folder: Path, /, *, kind: str, config: Mapping[str, Any], weights: Tensors, card: str
) -> None:
    """Write a model directory that `load_model` reads: config.json, model.safetensors, README.md.

    Args:
        folder: replaced whole if it is there.
        kind: what it is: "tokenizer" or "dynamics".
        config: JSON values that are enough to rebuild the model.
        weights: its parameters and buffers.
        card: the model card, Markdown.
    """
    with atomic_folder(folder) as temporary:
        table = _write_files(temporary, {"model.safetensors": save(_plain(weights))})
        content = {"schema": MODEL_SCHEMA, "kind": kind, "config": config, "files": table}
        (temporary / "config.json").write_text(to_json(content))
        (temporary / "README.md").write_text(card)


def load_model(folder: Path, /, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, weights) of a model directory.

    Raises:
        FormatError: if a file is missing or altered.
        MismatchError: if it is another kind of model.
    """
    path = folder / "config.json"
    content = read_json(path, what=f"the config of a {kind} model directory")
    if content.get("schema") != MODEL_SCHEMA:
        raise FormatError(f"{path}: schema {content.get('schema')!r}, readable is {MODEL_SCHEMA}")
    if content.get("kind") != kind:
        raise MismatchError(
            f"{folder}: holds a {content.get('kind')} model, but a {kind} is needed"
        )
    files, config = content.get("files"), content.get("config")
    if not isinstance(files, dict) or not isinstance(config, dict):
        raise FormatError(f"{path}: lacks the table of files or the config")
    weights = folder / "model.safetensors"
    _check_hash(weights, files.get("model.safetensors"))
    return config, _load(weights)


def load_weights(model: torch.nn.Module, weights: Tensors, /, *, where: str) -> None:
    """Copy weights into a model.

    Raises:
        FormatError: naming the tensors that are missing, unknown or of another shape.
    """
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise FormatError(f"{where}: the weights do not fit the config ({error!s:.300})") from error


def _plain(group: Tensors) -> dict[str, Tensor]:
    """Return tensors as safetensors wants them: on the CPU, contiguous, sharing nothing."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in group.items()}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not readable as safetensors ({error})") from error


def _check_hash(path: Path, about: Any) -> None:
    """Refuse a file that is missing or not of the size and hash it should have."""
    if not isinstance(about, dict) or not {"size_bytes", "sha256"} <= about.keys():
        raise FormatError(f"{path}: its size and hash are not recorded")
    if not path.is_file():
        raise FormatError(f"{path}: is missing; copy the folder again")
    size = path.stat().st_size
    if size != about["size_bytes"] or file_sha256(path) != about["sha256"]:
        raise FormatError(
            f"{path}: altered or cut short ({size} bytes, {about['size_bytes']} expected, "
            "or another hash); copy the folder again"
        )


def _remove(folder: Path) -> None:
    """Delete an old checkpoint so that a kill on the way leaves no half one under its name."""
    doomed = folder.with_name(f"tmp-{folder.name}")
    folder.rename(doomed)
    remove_leftovers(folder.parent)
