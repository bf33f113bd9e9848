"""What a file or folder is -> a description, as aligned text or as JSON with stable keys.

    EPISODES | SHARDS | model directory | run | checkpoint
    demo's folder | evaluation | generated folder            ->  describe  ->  {"kind": ..., ...}

Nothing here needs torch: weights are described by their headers.
"""

import json
import math
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tyro.conf import Positional
from worldloom.common import (
    ActionSpec,
    ConfigError,
    Episodes,
    FormatError,
    SlotArray,
    TokenShards,
    build,
    file_sha256,
    read_json,
    read_metrics,
    to_json,
    write_bytes,
)

from .commands import COMMANDS
from .info_text import render

_COUNTED_CODES = 50_000_000
"""Codes read to count their usage: a second's work, and plenty for a vocabulary of 2**16."""
_PREVIEW_EPISODES = 4
_PREVIEW_FRAMES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoConfig:
    """Say what a file or folder is: sizes, specs, fingerprints, actions, last metrics.

        worldloom info runs/demo/episodes --preview episodes.png

    Reads a folder of episodes or token shards, a model directory, a run or a checkpoint, and what
    demo, evaluate and generate wrote.
    """

    path: Positional[Path]
    """What to describe."""
    json: bool = False
    """Print JSON with stable keys instead of text."""
    verify: bool = False
    """Read every byte and compare it with the hashes there are; a difference is an error."""
    preview: Path | None = None
    """Episodes: write a PNG of some frames, each under the action that leads to the next one."""


def info(config: InfoConfig) -> str:
    """Return the description of `config.path`, as text or JSON.

    Raises:
        FormatError: if there is nothing that worldloom wrote, or it is damaged.
        ConfigError: if a preview is asked of what has no frames.
    """
    about = describe(config.path, verify=config.verify)
    if config.preview is not None:
        if about["kind"] != "episodes":
            raise ConfigError(
                f"--preview: {config.path} is {about['kind']}; only episodes have frames to show"
            )
        _write_preview(Episodes(Path(about["path"])), config.preview)
    return to_json(about).rstrip() if config.json else render(about)


def describe(path: Path, /, *, verify: bool = False) -> dict[str, Any]:
    """Return what stands at `path` as JSON values: "kind", "path", "size_bytes" and more.

    Args:
        path: a folder of worldloom's, or the file in it that says what it is.
        verify: read every byte that has a hash.

    Raises:
        FormatError: if it is missing, of no kind that worldloom writes, or damaged.
    """
    folder = path.parent if path.name in _SIGNS and path.is_file() else path
    if not folder.exists():
        raise FormatError(f"{path}: no such file or folder; expected {_EXPECTED}")
    kind = _kind(folder)
    if kind is None:
        inside = sorted(f"{p.name} ({_kind(p)})" for p in _subfolders(folder) if _kind(p))
        hint = f"; inside it there are {', '.join(inside)}" if inside else ""
        raise FormatError(f"{path}: expected {_EXPECTED}, found none of their files{hint}")
    describe_kind = {
        "episodes": _episodes,
        "shards": _shards,
        "tokenizer": _model,
        "dynamics": _model,
        "checkpoint": _checkpoint,
        "run": _run,
        "demo": _demo,
        "evaluation": _evaluation,
        "generated": _generated,
    }[kind]
    head = {"kind": kind, "path": str(folder), "size_bytes": _size(folder)}
    return {**head, **describe_kind(folder, verify)}


_SIGNS = (
    "episodes.json", "manifest.json", "config.json", "metrics.jsonl", "LATEST",
    "stages.json", "report.html", "report.json", "evaluation.json", "session.json",
)  # fmt: skip
_EXPECTED = (
    "a folder of episodes (episodes.json), token shards or a checkpoint (manifest.json), "
    "a model directory (config.json), a run (metrics.jsonl, checkpoints), a demo (stages.json), "
    "an evaluation (evaluation.json) or a generated folder (session.json)"
)


def _kind(folder: Path) -> str | None:
    """Return the kind of a folder by the file that every folder of that kind has."""
    if (folder / "episodes.json").is_file():
        return "episodes"
    if (folder / "config.json").is_file():
        content = read_json(folder / "config.json", what="the config of a model directory")
        return content["kind"] if content.get("kind") in ("tokenizer", "dynamics") else None
    if (folder / "manifest.json").is_file():
        schema = read_json(folder / "manifest.json", what="a manifest").get("schema", "")
        known = {"worldloom.token-shards": "shards", "worldloom.checkpoint": "checkpoint"}
        return known.get(str(schema).partition("/")[0])
    if (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir():
        return "run"
    signs = {"stages.json": "demo", "evaluation.json": "evaluation", "session.json": "generated"}
    return next((kind for sign, kind in signs.items() if (folder / sign).is_file()), None)


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _inside(folder: Path) -> dict[str, str]:
    """Return the kinds of the folders in a folder, by name; those of no kind are left out."""
    return {path.name: kind for path in sorted(_subfolders(folder)) if (kind := _kind(path))}


def _size(folder: Path) -> int:
    """Return the bytes of everything inside."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _episodes(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe a folder of episodes; with `verify`, read every frame."""
    episodes = Episodes(folder)
    spec = episodes.spec
    lengths, returns, slots = [], [], []
    for key in episodes.keys:
        with episodes.open(key) as episode:
            lengths.append(episode.num_frames)
            slots.append(spec.actions.encode(episode.actions))
            if (rewards := episode.rewards) is not None:
                returns.append(float(rewards.sum()))
            if verify:
                for _ in episode.pieces():
                    pass
    by_key = dict(zip(episodes.keys, lengths, strict=True))
    return {
        "num_episodes": len(lengths),
        "num_frames": sum(lengths),
        "seconds": sum(lengths) / spec.fps,
        "height": spec.height,
        "width": spec.width,
        "fps": spec.fps,
        "frame_skip": spec.frame_skip,
        "episode_frames": _spread(lengths),
        "episode_return": _spread(returns),
        "splits": _splits((name, by_key[key]) for name in _SPLITS for key in episodes.split(name)),
        "actions": _actions(spec.actions, slots),
        "source": dict(spec.source),
        "verified": verify,
    }


def _shards(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe token shards; with `verify`, hash every byte."""
    shards = TokenShards(folder)
    if verify:
        shards.verify()
    codes = shards.codes
    latent_frames = sum(row.latent_frames for row in shards.episodes)
    per_frame = codes.cells * codes.num_levels
    return {
        "num_shards": len(shards.manifest["shards"]),
        "num_episodes": len(shards.episodes),
        "num_frames": sum(row.num_frames for row in shards.episodes),
        "latent_frames": latent_frames,
        "num_codes": latent_frames * per_frame,
        "fps": shards.fps,
        "frame_skip": shards.frame_skip,
        "splits": _splits((row.split, row.num_frames) for row in shards.episodes),
        "fingerprint": shards.tokenizer.fingerprint,
        "tokenizer": shards.tokenizer.to_dict(),
        "code_usage": _code_usage(shards),
        "actions": _actions(shards.actions, map(shards.slots_TA, range(len(shards.episodes)))),
        "metrics": shards.metrics,
        "source": shards.source,
        "verified": verify,
    }


def _model(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe a model directory; with `verify`, hash its weights."""
    content = read_json(folder / "config.json", what="the config of a model directory")
    files = _files(folder, content.get("files"), verify)
    config = content.get("config")
    if not isinstance(config, dict):
        raise FormatError(f"{folder / 'config.json'}: lacks the config")
    return {
        **_weights(folder / "model.safetensors"),
        "fingerprint": config.get("fingerprint"),
        "config": {key: value for key, value in config.items() if key != "fingerprint"},
        "files": files,
        "verified": verify,
    }


def _checkpoint(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe one checkpoint; with `verify`, hash its files."""
    manifest = read_json(folder / "manifest.json", what="the manifest of a checkpoint")
    files = _files(folder, manifest.get("files"), verify)
    return {
        "step": manifest.get("step"),
        "groups": {
            Path(name).stem: _weights(folder / name)
            for name in files
            if name.endswith(".safetensors")
        },
        "files": files,
        "verified": verify,
    }


def _run(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe a run directory; with `verify`, hash its checkpoints."""
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if verify:
        for checkpoint in checkpoints:
            _checkpoint(checkpoint, verify)
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if value is not None}
    return {
        "step": last.pop("step", 0),
        "last_metrics": last,
        "checkpoints": [path.name for path in checkpoints],
        "latest": _text(folder / "LATEST").strip() or None,
        "models": _inside(folder),
        "config": _toml(folder / "config.toml"),
        "verified": verify,
    }


def _demo(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe a demo's folder; with `verify`, everything in it."""
    # Here and not above: a command's help loads no other command's module.
    from .demo import StageRecord

    path = folder / "stages.json"
    records = {
        name: build(StageRecord, record, where=f"{path}: {name}", error=FormatError)
        for name, record in read_json(path, what="the stages of a demo").items()
    }
    # JSON keeps no order; the commands' own is that of the data.
    order = sorted(records, key=lambda name: [*COMMANDS, name].index(name))
    inside = _inside(folder)
    if verify:
        for name in inside:
            describe(folder / name, verify=True)
    return {
        "seconds": sum(record.seconds for record in records.values()),
        "stages": {
            name: {"seconds": records[name].seconds, "finished": records[name].finished}
            for name in order
        },
        "folders": inside,
        "report": "report.html" if (folder / "report.html").is_file() else None,
        "verified": verify,
    }


def _evaluation(folder: Path, _verify: bool) -> dict[str, Any]:
    """Describe an evaluation by its numbers; it has no hashes to verify."""
    # Here and not above: a command's help loads no other command's module.
    from .evaluate import EVALUATION_SCHEMA, TOKENIZER_EVALUATION_SCHEMA

    path = folder / "evaluation.json"
    groups_of = {
        EVALUATION_SCHEMA: ("tokenizer", "dynamics", "rollout", "play", "settings"),
        TOKENIZER_EVALUATION_SCHEMA: ("tokenizer", "perceptual", "speed", "settings"),
    }
    content = _read_schema(path, *groups_of)
    groups = groups_of[content["schema"]]
    for group in groups:
        if not isinstance(content.get(group), dict):
            raise FormatError(
                f"{path}: lacks the numbers of {group}; run `worldloom evaluate` again"
            )
    pictures = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".gif"))
    return {
        "judged": "a tokenizer alone" if "speed" in groups else "a model and its tokenizer",
        **{group: content[group] for group in groups},
        "pictures": pictures,
        "verified": False,
    }


def _generated(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe a generated folder; with `verify`, compare its codes with their checksums."""
    # Here and not above: a command's help loads no other command's module.
    from .generate import SESSION_SCHEMA

    path = folder / "session.json"
    session = _read_schema(path, SESSION_SCHEMA)
    try:
        names = [name or "none" for name in session["action_names"]]
        held = [(name, len(list(same))) for name, same in groupby(names)]
        about = {
            "seeds": list(session["seeds"]),
            "sampling": dict(session["sampling"]),
            "start": session["start"],
            "model": session["model"],
            "fingerprint": session["tokenizer"],
            "fps": session["fps"],
            "prompt_frames": session["prompt_frames"],
            "num_samples": len(session["seeds"]),
            "num_frames": 1 + len(session["prompt_actions"]) + len(names),
            "generated_frames": len(names),
            "actions": [f"{name}*{times}" if times > 1 else name for name, times in held],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: is not a session of `worldloom generate` ({error!r}); generate it again"
        ) from error
    if verify:
        _verify_zip(folder / "codes.npz")
    return {**about, "verified": verify}


def _read_schema(path: Path, *schemas: str) -> dict[str, Any]:
    """Return the JSON object in a file that must have exactly one of these schemas."""
    wanted = " or ".join(schemas)
    content = read_json(path, what=f"a file of schema {wanted}")
    if content.get("schema") not in schemas:
        raise FormatError(
            f"{path}: expected schema {wanted}, found {content.get('schema')!r}; it is another "
            "version's, or not of worldloom"
        )
    return content


def _verify_zip(path: Path) -> None:
    """Compare every member of a zip with its CRC-32."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise FormatError(f"{path}: not readable as a zip ({error}); generate it again") from error
    if damaged is not None:
        raise FormatError(f"{path}: its member {damaged} is damaged; generate it again")


_SPLITS = ("train", "validation")


def _splits(rows: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Count episodes and frames of every split."""
    splits = {name: {"num_episodes": 0, "num_frames": 0} for name in _SPLITS}
    for name, num_frames in rows:
        splits[name]["num_episodes"] += 1
        splits[name]["num_frames"] += num_frames
    return splits


def _spread(values: list[Any]) -> dict[str, float] | None:
    """Return the least, middle and greatest of some numbers."""
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def _actions(spec: ActionSpec, slots: Iterable[SlotArray]) -> dict[str, Any]:
    """Return the action spec and how often every action was chosen.

    `histogram` maps a choice or a key to its number of steps; for several axes, an axis to such
    numbers, one a value or bin from the lowest. Keys that are held together count each.
    """
    counts = [np.zeros(size, np.int64) for size in spec.sizes]
    none = steps = 0
    for slots_TA in slots:
        steps += len(slots_TA)
        for slot, count in enumerate(counts):
            count += np.bincount(slots_TA[:, slot], minlength=len(count))
        none += int((slots_TA == 0).all(1).sum()) if spec.kind == "keys" else 0
    histogram: dict[str, Any] = {}
    if spec.kind == "discrete":
        histogram = dict(zip(spec.names, counts[0].tolist(), strict=True))
    elif spec.kind == "keys":
        pressed = np.sum(counts, axis=0)[1:]
        histogram = {"none": none, **dict(zip(spec.names, pressed.tolist(), strict=True))}
    elif spec.kind != "none":
        histogram = {name: count.tolist() for name, count in zip(spec.names, counts, strict=True)}
    return {"kind": spec.kind, "names": list(spec.names), "steps": steps, "histogram": histogram}


def _code_usage(shards: TokenShards) -> dict[str, Any]:
    """Count codes: all of them, or those of episodes spread evenly, if there are very many.

    Every level of a residual tokenizer has a codebook of its own, so each is counted by itself, and
    "levels" has the numbers of each. Those above are of all: the codes used of all codebooks, and
    the geometric mean of the perplexities.
    """
    total = sum(row.codes_bytes for row in shards.episodes)
    stride = max(1, -(-total // (_COUNTED_CODES * np.dtype(shards.codes.dtype).itemsize)))
    counted = range(0, len(shards.episodes), stride)
    depth, vocab_size = shards.codes.num_levels, shards.codes.vocab_size
    counts_QV = np.zeros((depth, vocab_size), np.int64)
    for index in counted:
        codes_NQ = shards.codes_thw(index).reshape(-1, depth)
        for level in range(depth):
            counts_QV[level] += np.bincount(codes_NQ[:, level], minlength=vocab_size)
    entropies = [_entropy(counts_V) for counts_V in counts_QV]
    about = {
        "vocab_size": vocab_size,
        "codes_used": int((counts_QV > 0).sum()),
        "codes_used_fraction": float((counts_QV > 0).mean()),
        "perplexity": math.exp(sum(entropies) / depth),
        "episodes_counted": len(counted),
    }
    levels = {
        "codes_used": (counts_QV > 0).sum(1).tolist(),
        "codes_used_fraction": (counts_QV > 0).mean(1).tolist(),
        "perplexity": [math.exp(entropy) for entropy in entropies],
    }
    return {**about, "levels": levels} if depth > 1 else about


def _entropy(counts_V: npt.NDArray[np.int64]) -> float:
    """Return the entropy, in nats, of how often each code occurs."""
    share: npt.NDArray[np.float64] = counts_V[counts_V > 0] / max(1, counts_V.sum())
    return float(-(share * np.log(share)).sum())


def _files(folder: Path, table: Any, verify: bool) -> dict[str, int]:
    """Return the size of every file of a table, after comparing it, or its hash, with the table."""
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise FormatError(f"{folder}: its table of files is not readable; copy the folder again")
    sizes = {}
    for name, row in table.items():
        path = folder / name
        if name != Path(name).name or not path.is_file():
            raise FormatError(f"{path}: is missing; copy the folder again")
        sizes[name] = path.stat().st_size
        if sizes[name] != row.get("size_bytes") or (
            verify and file_sha256(path) != row.get("sha256")
        ):
            raise FormatError(
                f"{path}: altered or cut short ({sizes[name]} bytes, {row.get('size_bytes')} "
                "expected, or another hash); copy the folder again"
            )
    return sizes


def _weights(path: Path) -> dict[str, int]:
    """Count the tensors and numbers of a safetensors file from its header alone."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # A forged length must not fill the memory; safetensors has the same bound.
            header = json.loads(file.read(min(length, 100_000_000)))
        shapes = [row["shape"] for name, row in header.items() if name != "__metadata__"]
        return {"num_tensors": len(shapes), "num_parameters": sum(map(math.prod, shapes))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as safetensors ({error})") from error


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path))
    except ValueError as error:
        raise FormatError(f"{path}: not readable as TOML ({error})") from error


def _write_preview(episodes: Episodes, path: Path) -> None:
    """Write a PNG: consecutive frames of some episodes, each under the action that follows it."""
    from .pictures import Strip, draw_sheet, encode_png, fitting_scale  # Pillow and PyAV

    stride = max(1, len(episodes.keys) // _PREVIEW_EPISODES)
    strips = []
    for key in episodes.keys[::stride][:_PREVIEW_EPISODES]:
        with episodes.open(key) as episode:
            start = max(0, (episode.num_frames - _PREVIEW_FRAMES) // 2)
            stop = min(episode.num_frames, start + _PREVIEW_FRAMES)
            actions = episodes.spec.actions.encode(episode.actions)[start:stop]
            words = [*episodes.spec.actions.describe(actions), "end"][: stop - start]
            labels = [f"{start + i}: {word}" for i, word in enumerate(words)]
            strips.append(Strip(title=key, frames_THWC=episode.frames(start, stop), labels=labels))
    scale = fitting_scale(episodes.spec.height, episodes.spec.width, target=144)
    sheet = draw_sheet(strips, scale=scale, columns=_PREVIEW_FRAMES)
    write_bytes(path, encode_png(sheet))
