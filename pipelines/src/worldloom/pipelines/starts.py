"""Where a rollout starts: a moment of an episode, in token shards or as frames, or a picture.

    SHARDS | EPISODES             -> held_out_moments -> Moments, some apart, episode after episode
    SHARDS | EPISODES, a Moment   -> read_start -> Start: codes and actions, what truly followed
    picture.png, or its bytes     -> read_start, start_from_picture -> Start of one frame

Episodes are encoded from their first frame on, as `worldloom tokenize` does, so that shards and
episodes give the same prompt.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from worldloom.common import (
    ActionSpec,
    ConfigError,
    Episodes,
    FormatError,
    Frames,
    MismatchError,
    SlotArray,
    TokenShards,
)
from worldloom.dynamics import NULL, DynamicsModel
from worldloom.tokenizer import VideoTokenizer

from .encoding import fit, require_size
from .world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Which part of an episode is the prompt."""

    episode: str
    """A key, or a number among the held-out episodes (among all, if none is)."""
    start_frame: int
    """Pixel frame of the episode where the prompt begins."""
    prompt_frames: int
    """Latent frames of the prompt."""
    sequel_steps: int | None = None
    """How much of what truly followed is read, in steps; None for all."""


@dataclass(frozen=True, slots=True)
class Start:
    """A prompt, and what truly happened after it."""

    codes_thw: torch.Tensor
    """int64, the prompt's latent frames; (t, h, w, Q) where cells have levels."""
    slots_TA: SlotArray
    """The r (t - 1) actions between them; NULL where nobody knows them."""
    true_slots_TA: SlotArray
    """The actions that followed in the episode; none for a picture, or where nobody knows them."""
    true_frames_THWC: Frames | None
    """The frames of prompt and sequel: pixels, or where only codes are known, those decoded."""
    source: str
    """For people: which moment of what."""


def read_start(path: Path, world: World, moment: Moment, /, *, with_frames: bool = True) -> Start:
    """Read a prompt for a world.

    Args:
        path: token shards, episodes, or a picture.
        world: encodes frames; its actions and tokenizer the prompt must share.
        moment: which part of an episode. A picture is a prompt of one frame, whatever this says.
        with_frames: False leaves out true_frames_THWC, which shards would have to decode.

    Raises:
        FormatError: if there is nothing there.
        ConfigError: if there is no such episode, or it is too short.
        MismatchError: if it was recorded with other actions, written by another tokenizer, or of
            frames that the tokenizer does not take.
    """
    if path.is_file():
        return start_from_picture(path, world, source=path.name)
    if (path / "manifest.json").is_file():
        return _from_shards(path, world, moment, with_frames=with_frames)
    if (path / "episodes.json").is_file():
        start = _from_episodes(path, world, moment)
        return start if with_frames else replace(start, true_frames_THWC=None)
    raise _no_starts(path, of_pictures=True)


def held_out_moments(
    path: Path, world: World, /, *, prompt_frames: int, apart_frames: int
) -> list[Moment]:
    """Return where held-out episodes (all, if none is) may start: as many as there are.

    First the beginning of every episode, then a later moment of every one that is long enough, and
    so on: any number of them, taken from the first, is as varied as it can be.

    Args:
        path: token shards or episodes.
        world: says how many pixel frames a prompt takes.
        prompt_frames: latent frames of every prompt; one frame more must follow it.
        apart_frames: pixel frames from one start to the next in an episode, rounded up to whole
            latent frames.

    Raises:
        FormatError: if there is nothing there, or nothing is long enough.
    """
    lengths = _held_out_lengths(path)
    codes = world.model.spec.tokenizer.codes
    r, needed = codes.frames_per_latent, codes.pixel_frames(prompt_frames) + 1
    apart = -(-apart_frames // r) * r
    rounds = max(0, max(length for _, length in lengths) - needed) // apart + 1
    moments = [
        Moment(episode=key, start_frame=turn * apart, prompt_frames=prompt_frames)
        for turn in range(rounds)
        for key, length in lengths
        if turn * apart + needed <= length
    ]
    if not moments:
        raise FormatError(
            f"{path}: no held-out episode has the {needed} frames of a prompt of {prompt_frames} "
            "latent frames and one to come; take fewer prompt frames, or longer episodes"
        )
    return moments


def start_from_picture(picture: Path | bytes | Frames, world: World, /, *, source: str) -> Start:
    """Encode a picture as a prompt of one frame, at the tokenizer's size by its rule.

    A file is turned as its camera says.

    Args:
        picture: a file, the bytes of one, or frame_HWC uint8.
        world: encodes it.
        source: what it is called, for people.

    Raises:
        FormatError: if it is no picture.
        MismatchError: if the tokenizer does not take its size.
    """
    frame_HWC = picture if isinstance(picture, np.ndarray) else _opened(picture, source)
    if (
        frame_HWC.ndim != 3
        or frame_HWC.shape[2] != 3
        or frame_HWC.dtype != np.uint8
        or 0 in frame_HWC.shape
    ):
        raise FormatError(
            f"{source}: {frame_HWC.dtype} {frame_HWC.shape}, must be uint8 (height, width, 3), and "
            "not empty"
        )
    tokenizer = world.tokenizer
    where = picture if isinstance(picture, Path) else Path(source)
    require_size((frame_HWC.shape[0], frame_HWC.shape[1]), tokenizer.spec, where=where)
    frames = fit(frame_HWC[None], tokenizer.spec)
    none = np.zeros((0, world.model.spec.actions.num_slots), np.int64)
    return Start(_encode(frames, tokenizer), none, none, None, source)


def require_actions(model: DynamicsModel, other: ActionSpec, /, *, where: str) -> None:
    """Refuse actions of another kind than the model's; where there are none, none is misread.

    Raises:
        MismatchError: naming both.
    """
    mine = model.spec.actions
    if other not in (mine, ActionSpec.none()):
        raise MismatchError(
            f"{where}: has {other.kind} actions ({', '.join(other.names)}), but the model was "
            f"trained on {mine.kind} ones ({', '.join(mine.names)}); the same number would press "
            "another key. Use what the model was trained on"
        )


def _no_starts(path: Path, *, of_pictures: bool) -> FormatError:
    """Return the error for a path at which nothing can start."""
    found = "no such file or folder"
    if path.is_dir():
        found = "has neither manifest.json nor episodes.json"
    elif path.exists():
        found = "is no folder"
    wanted = "a folder of token shards or of episodes" + (", or a picture" if of_pictures else "")
    return FormatError(f"{path}: {found}; --start takes {wanted}")


def _held_out_lengths(path: Path) -> list[tuple[str, int]]:
    """Return (key, pixel frames) of the held-out episodes, or of all if none is."""
    if (path / "manifest.json").is_file():
        shards = TokenShards(path)
        numbers = shards.split("validation") or range(len(shards.episodes))
        rows = [shards.episodes[number] for number in numbers]
        return [(row.key, row.num_frames) for row in rows]
    if not (path / "episodes.json").is_file():
        raise _no_starts(path, of_pictures=False)
    episodes, lengths = Episodes(path), []
    for key in episodes.split("validation") or episodes.keys:
        with episodes.open(key) as opened:
            lengths.append((key, opened.num_frames))
    return lengths


def _opened(picture: Path | bytes, source: str) -> Frames:
    """Return frame_HWC of a picture's file or bytes."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except Exception as error:  # a file made to break a reader makes it fail with anything
        where = picture if isinstance(picture, Path) else source
        raise FormatError(f"{where}: not a readable picture ({error})") from error


def _from_shards(path: Path, world: World, moment: Moment, *, with_frames: bool) -> Start:
    """Take the codes of a moment of an episode in token shards."""
    shards = TokenShards(path)
    world.tokenizer.spec.require(shards.tokenizer, here="the tokenizer", there=str(path))
    require_actions(world.model, shards.actions, where=str(path))
    keys = [row.key for row in shards.episodes]
    held_out = [keys[index] for index in shards.split("validation")]
    key = _pick(moment.episode, keys, held_out, where=path)
    index = keys.index(key)
    row, codes = shards.episodes[index], shards.tokenizer.codes
    first = _first_latent(moment, row.num_frames, world.model, where=f"{path}: {key}")
    num_frames = _wanted_frames(moment, row.num_frames, world.model)
    last = first + codes.latent_frames(num_frames)
    codes_thw = torch.from_numpy(shards.codes_thw(index, first, last).astype(np.int64))
    frames_THWC = None
    if with_frames:
        frames_BTHWC = world.tokenizer.decode(codes_thw[None], num_frames=num_frames)
        frames_THWC = frames_BTHWC[0].cpu().numpy()
    start = moment.start_frame
    known = row.labelled and shards.actions == world.model.spec.actions
    slots_TA = shards.slots_TA(index, start, start + num_frames - 1) if known else None
    return _cut(world, moment, key, (codes_thw, slots_TA, frames_THWC))


def _from_episodes(path: Path, world: World, moment: Moment) -> Start:
    """Encode a moment of a recorded episode."""
    episodes = Episodes(path)
    require_actions(world.model, episodes.spec.actions, where=str(path))
    size = (episodes.spec.height, episodes.spec.width)
    require_size(size, world.tokenizer.spec, where=path)
    key = _pick(moment.episode, episodes.keys, episodes.split("validation"), where=path)
    with episodes.open(key) as opened:
        where = f"{path}: {key}"
        first = _first_latent(moment, opened.num_frames, world.model, where=where)
        start = moment.start_frame
        stop = start + _wanted_frames(moment, opened.num_frames, world.model)
        frames = fit(opened.frames(0, stop), world.tokenizer.spec)
        known = episodes.spec.actions == world.model.spec.actions
        slots_TA = opened.slots_TA if known else None
    codes_thw = _encode(frames, world.tokenizer)[first:]
    slots_TA = None if slots_TA is None else slots_TA[start : stop - 1]
    return _cut(world, moment, key, (codes_thw, slots_TA, frames[start:]))


def _pick(episode: str, keys: list[str], held_out: list[str], *, where: Path) -> str:
    """Return the key that a person meant."""
    if episode in keys:
        return episode
    choices = held_out or keys
    if episode.isdecimal() and int(episode) < len(choices):
        return choices[int(episode)]
    among = "the held-out ones" if held_out else "all"
    raise ConfigError(
        f"{where}: has no --episode {episode!r}; name one by its key (such as {choices[0]}), "
        f"or by its number among {among}, 0 to {len(choices) - 1}"
    )


def _first_latent(moment: Moment, num_frames: int, model: DynamicsModel, *, where: str) -> int:
    """Return the latent frame that begins at a pixel frame, after checking that a prompt fits."""
    codes = model.spec.tokenizer.codes
    start_frame = moment.start_frame
    if start_frame < 0:
        raise ConfigError(f"{where}: --start-frame {start_frame} is before the first, which is 0")
    if start_frame % codes.frames_per_latent:
        raise ConfigError(
            f"{where}: --start-frame {start_frame} lies inside a latent frame; "
            f"take a multiple of {codes.frames_per_latent}"
        )
    wanted = codes.pixel_frames(moment.prompt_frames)
    if start_frame + wanted > num_frames:
        raise ConfigError(
            f"{where}: has {num_frames} frames, but the prompt takes {wanted} from frame "
            f"{start_frame} on; lower --start-frame or --prompt-frames, or take another --episode"
        )
    return start_frame // codes.frames_per_latent


def _wanted_frames(moment: Moment, num_frames: int, model: DynamicsModel, /) -> int:
    """Return how many pixel frames of the episode are read, from the prompt's first on."""
    left = num_frames - moment.start_frame
    if moment.sequel_steps is None:
        return left
    wanted = model.spec.tokenizer.codes.pixel_frames(moment.prompt_frames) + moment.sequel_steps
    return min(left, wanted)


def _encode(frames_THWC: Frames, tokenizer: VideoTokenizer) -> torch.Tensor:
    """Return codes_thw of one video."""
    return tokenizer.encode(torch.from_numpy(np.ascontiguousarray(frames_THWC))[None])[0].cpu()


def _cut(
    world: World,
    moment: Moment,
    key: str,
    rest: tuple[torch.Tensor, SlotArray | None, Frames | None],
) -> Start:
    """Part (codes_thw, slots_TA, frames_THWC) from a moment on into the prompt and its sequel."""
    codes_thw, slots_TA, frames_THWC = rest
    steps = (moment.prompt_frames - 1) * world.steps_per_latent
    if slots_TA is None:
        slots_TA = np.full((steps, world.model.spec.actions.num_slots), NULL, np.int64)
    return Start(
        codes_thw[: moment.prompt_frames],
        slots_TA[:steps],
        slots_TA[steps:],
        frames_THWC,
        f"{key}, frame {moment.start_frame}",
    )
