"""Checkpoints and model directories: safetensors and JSON, whole or not at all, no pickle.

    tensors by group + state -> save_checkpoint   -> RUN/checkpoints/step-00001000/
                                                     {GROUP.safetensors, state.json, manifest.json}
    RUN                      -> newest_checkpoint -> the newest whose every byte is as it was

    config + weights         -> save_model -> FOLDER/{config.json, model.safetensors, README.md}
    FOLDER                   -> load_model -> the same, checked

safetensors refuses torn files but loads a flipped payload bit; hence SHA-256 of every file.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
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
    parse_json,
    plain_name,
    read_json,
    read_limited,
    remove_leftovers,
    settle_folder,
    settle_folders,
    storage_errors,
    temporary_path,
    to_json,
    write_bytes,
)
from .specs import check_count

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


def _write_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, Any]]:
    """Write files into a temporary folder, one by one; return the size and hash of each."""
    table = {}
    for name, content in files:
        with storage_errors(folder / name, size_bytes=len(content)):
            (folder / name).write_bytes(content)
        failpoint("checkpoint-file")
        digest = hashlib.sha256(content).hexdigest()
        table[name] = {"size_bytes": len(content), "sha256": digest}
    return table


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return JSON that carries the hash of its other fields, since no other file holds it."""
    content = json.loads(to_json(content))  # as a reader will find it: keys are strings, in order
    digest = hashlib.sha256(to_json(content).encode()).hexdigest()
    return to_json({**content, "sha256": digest}).encode()


def _read_sealed(path: Path, schema: str, what: str) -> dict[str, Any]:
    """Read what `_sealed` wrote; refuse another schema, or another byte that means something."""
    content = read_json(path, what=what)
    if content.get("schema") != schema:
        raise FormatError(f"{path}: schema {content.get('schema')!r:.60}, readable is {schema}")
    digest = content.pop("sha256", None)
    if digest != hashlib.sha256(to_json(content).encode()).hexdigest():
        raise FormatError(f"{path}: altered since it was written; copy the folder again")
    return content


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    /,
    *,
    keep: int = 2,
) -> Path:
    """Write RUN/checkpoints/step-%08d, then RUN/LATEST; return the checkpoint's path.

    Args:
        run: the run directory.
        step: optimizer updates done.
        tensors: by group; each group becomes GROUP.safetensors.
        state: JSON values.
        keep: how many stay: this one and the `keep` - 1 before it, at least 1.

    Raises:
        StorageError: if the disk refuses; the older checkpoints stay as they were.
    """
    checkpoints = run / "checkpoints"
    folder = checkpoints / f"step-{step:08d}"
    remove_leftovers(checkpoints)
    with atomic_folder(folder) as temporary:
        # Only one is in memory at a time.
        files = ((f"{name}.safetensors", save(_plain(group))) for name, group in tensors.items())
        described = [("state.json", to_json(state).encode())]
        table = _write_files(temporary, chain(files, described))
        manifest = {"schema": CHECKPOINT_SCHEMA, "step": step, "files": table}
        (temporary / "manifest.json").write_bytes(_sealed(manifest))
    failpoint("checkpoint-latest")
    write_bytes(run / "LATEST", f"checkpoints/{folder.name}\n".encode())
    # Only older ones: a later step here is damaged, or this step could not have come after it.
    with storage_errors(checkpoints):
        for old in [path for number, path in _steps(checkpoints) if number <= step][keep:]:
            _remove(old)
    return folder


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint there, the newest first."""
    found = [(re.fullmatch(r"step-(\d{8,12})", p.name), p) for p in checkpoints.glob("step-*")]
    return sorted([(int(match[1]), path) for match, path in found if match], reverse=True)


def newest_checkpoint(run: Path, /) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint of a run, and a sentence for each that was skipped.

    Safe beside a training that is writing: what is temporary stays.
    """
    checkpoints = run / "checkpoints"
    if not checkpoints.is_dir():
        return None, []
    settle_folders(checkpoints)
    skipped: list[str] = []
    for _, folder in _steps(checkpoints):
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
    manifest = _read_sealed(path, CHECKPOINT_SCHEMA, "the manifest of a checkpoint")
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not isinstance(step, int) or "state.json" not in files:
        raise FormatError(f"{path}: lacks the table of files")
    tensors, state = {}, None
    for name, about in files.items():
        file = folder / plain_name(name, where=str(path))
        content = _read_checked(file, about)
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = _load(content, where=str(file))
        elif name == "state.json":
            state = parse_json(content, where=str(file))
    if not isinstance(state, dict):
        raise FormatError(f"{folder / 'state.json'}: must be a JSON object")
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

    Raises:
        StorageError: if the disk refuses; an older model stays as it was.
    """
    with atomic_folder(folder) as temporary:
        table = _write_files(temporary, [("model.safetensors", save(_plain(weights)))])
        content = {"schema": MODEL_SCHEMA, "kind": kind, "config": config, "files": table}
        (temporary / "config.json").write_bytes(_sealed(content))
        (temporary / "README.md").write_bytes(card.encode())


def load_model(folder: Path, /, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, weights) of a model directory.

    Raises:
        FormatError: if a file is missing or altered.
        MismatchError: if it is another kind of model.
    """
    settle_folder(folder)
    path = folder / "config.json"
    content = _read_sealed(path, MODEL_SCHEMA, f"the config of a {kind} model directory")
    if content.get("kind") != kind:
        raise MismatchError(
            f"{folder}: holds a {content.get('kind')} model, but a {kind} is needed"
        )
    files, config = content.get("files"), content.get("config")
    if not isinstance(files, dict) or not isinstance(config, dict):
        raise FormatError(f"{path}: lacks the table of files or the config")
    weights = folder / "model.safetensors"
    return config, _load(_read_checked(weights, files.get(weights.name)), where=str(weights))


def load_weights(model: torch.nn.Module, weights: Tensors, /, *, where: str) -> None:
    """Copy weights into a model.

    Raises:
        FormatError: naming the tensors that are missing, unknown or of another shape.
    """
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise FormatError(f"{where}: the weights do not fit the config ({reason:.300})") from error


def _plain(group: Tensors) -> dict[str, Tensor]:
    """Return tensors as safetensors wants them: on the CPU, contiguous, sharing nothing."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in group.items()}


def _load(content: bytes, where: str) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"{where}: not readable as safetensors ({error})") from error


def _read_checked(path: Path, about: Any) -> bytes:
    """Return a file's bytes; refuse one that is missing or not of the size and hash it should be.

    Read once: what is hashed is what is parsed.
    """
    if not isinstance(about, dict) or set(about) != {"size_bytes", "sha256"}:
        raise FormatError(f"{path}: its size and hash are not recorded")
    size, digest = about["size_bytes"], about["sha256"]
    check_count(str(path), "size_bytes", size, low=0, high=1 << 50)
    content = read_limited(path, what=f"a file of {size} bytes", limit_bytes=size)
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise FormatError(
            f"{path}: altered or cut short ({len(content)} bytes, {size} expected, "
            "or another hash); copy the folder again"
        )
    return content


def _remove(folder: Path) -> None:
    """Delete an old checkpoint so that a kill on the way leaves no half one under its name."""
    doomed = temporary_path(folder)
    folder.rename(doomed)
    remove_leftovers(folder.parent)
