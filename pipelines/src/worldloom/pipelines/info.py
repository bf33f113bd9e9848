"""What a file or folder is -> a description, as aligned text or as JSON with stable keys.

    EPISODES | SHARDS | model directory | run | checkpoint | demo's folder
    evaluation | generated folder | play session             ->  describe  ->  {"kind": ..., ...}

Nothing here needs torch: weights are described by their headers.
"""

import json
import math
import tomllib
import zipfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg
from worldloom.common import (
    ActionArray,
    ActionSpec,
    ConfigError,
    Episode,
    Episodes,
    FormatError,
    build,
    file_sha256,
    read_json,
    read_metrics,
    say,
    to_json,
    write_bytes,
)

from .commands import COMMANDS
from .info_data import describe_episodes, describe_shards
from .info_text import render

_PREVIEW_EPISODES = 4
_PREVIEW_FRAMES = 10
_UNKNOWN = "no action known"


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoConfig:
    """Say what a file or folder is: sizes, specs, fingerprints, actions, last metrics.

        worldloom info runs/demo/episodes --preview episodes.png

    Reads a folder of episodes or token shards, a model directory, a run or a checkpoint, and what
    demo, evaluate, generate and play wrote.
    """

    path: Positional[Path]
    """What to describe."""
    json: bool = False
    """Print JSON with stable keys instead of text."""
    verify: bool = False
    """Read every byte and compare it with the hashes there are; a difference is an error."""
    preview: Annotated[Path | None, arg(metavar="PATH")] = None
    """Episodes: write a PNG of some frames, each under the action that leads on to the frame to its
    right."""


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
        if not inside and (folder / "plan.json").is_file():
            hint = (
                ". It has a plan.json, so it is a folder of token shards that is not finished: run "
                "its command again, it continues where it stopped"
            )
        raise FormatError(f"{path}: expected {_EXPECTED}, found none of their files{hint}")
    describe_kind = {
        "episodes": describe_episodes,
        "shards": describe_shards,
        "tokenizer": _model,
        "dynamics": _model,
        "checkpoint": _checkpoint,
        "run": _run,
        "demo": _demo,
        "evaluation": _evaluation,
        "generated": _generated,
        "session": _session,
        "starts": _starts,
    }[kind]
    head = {"kind": kind, "path": str(folder), "size_bytes": _size(folder)}
    return {**head, **describe_kind(folder, verify)}


_SIGNS = (
    "episodes.json", "manifest.json", "config.json", "metrics.jsonl", "LATEST",
    "stages.json", "report.html", "report.json", "evaluation.json", "session.json",
    "starts.json",
)  # fmt: skip
_EXPECTED = (
    "a folder of episodes (episodes.json), token shards or a checkpoint (manifest.json), "
    "a model directory (config.json), a run (metrics.jsonl, checkpoints), a demo (stages.json), "
    "an evaluation (evaluation.json), a generated folder (session.json, starts.json) or a play "
    "session (session.json)"
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
    if (folder / "session.json").is_file():
        schema = read_json(folder / "session.json", what="a session").get("schema", "")
        played = str(schema).startswith("worldloom.play-session/")
        return "session" if played else "generated"
    signs = {"stages.json": "demo", "evaluation.json": "evaluation", "starts.json": "starts"}
    return next((kind for sign, kind in signs.items() if (folder / sign).is_file()), None)


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _inside(folder: Path) -> dict[str, str]:
    """Return the kinds of the folders in a folder, by name; those of no kind are left out."""
    return {path.name: kind for path in sorted(_subfolders(folder)) if (kind := _kind(path))}


def _size(folder: Path) -> int:
    """Return the bytes of everything inside."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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


def _session(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe a play session; see `describe_session`."""
    # Here and not above: a command's help loads no other command's module.
    from .info_session import describe_session

    return describe_session(folder, verify)


def _starts(folder: Path, verify: bool) -> dict[str, Any]:
    """Describe what was generated from several starts; with `verify`, check each one's codes."""
    from .info_starts import describe_starts

    about, inside = describe_starts(folder)
    for one in inside if verify else ():
        _generated(one, verify)
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
            words = words_between(episode)[start:stop]
            # ">": the action stands between this frame and the one to its right.
            labels = [f"{start + i}: {word} >" for i, word in enumerate(words)]
            labels += [f"{stop - 1}: end"] * (stop - start - len(words))
            strips.append(Strip(title=key, frames_THWC=episode.frames(start, stop), labels=labels))
    scale = fitting_scale(episodes.spec.height, episodes.spec.width, target=144)
    sheet = draw_sheet(strips, scale=scale, columns=_PREVIEW_FRAMES)
    write_bytes(path, encode_png(sheet))
    say(f"{path}: over each frame stands its number and the action that leads on to the next frame")


def words_between(episode: Episode, /) -> list[str]:
    """Return a few words on every step of an episode: its action, or that nobody knows it."""
    raw = episode.actions
    if raw is None:
        return [_UNKNOWN] * (episode.num_frames - 1)
    return action_words(episode.spec.actions, raw)


def action_words(spec: ActionSpec, raw: ActionArray, /) -> list[str]:
    """Return a few words an action: of many choices at once, those that are not as mostly.

    Args:
        spec: of the actions.
        raw: of all steps of an episode, which tell how it mostly is.
    """
    slots_TA = spec.encode(raw)
    if spec.kind != "multi_discrete" or spec.num_slots <= 2 or not len(slots_TA):
        return spec.describe(slots_TA)
    columns = zip(slots_TA.T, spec.sizes, strict=True)
    usual_A = [int(np.bincount(column, minlength=size).argmax()) for column, size in columns]
    return [
        " ".join(
            f"{name}={slot}"
            for name, slot, usual in zip(spec.names, slots, usual_A, strict=True)
            if slot != usual
        )
        or "-"
        for slots in slots_TA
    ]
