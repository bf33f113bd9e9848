"""Where a rollout starts: a moment of an episode, in token shards or as frames, or a picture.

    SHARDS | EPISODES | picture.png  -> read_start -> Start: codes and actions, what truly followed

Episodes are encoded from their first frame on, as `worldloom tokenize` does, so that shards and
episodes give the same prompt.
"""

from dataclasses import dataclass
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


def read_start(path: Path, world: World, moment: Moment, /) -> Start:
    """Read a prompt for a world.

    Args:
        path: token shards, episodes, or a picture.
        world: encodes frames; its actions and tokenizer the prompt must share.
        moment: which part of an episode. A picture is a prompt of one frame, whatever this says.

    Raises:
        FormatError: if there is nothing there.
        ConfigError: if there is no such episode, or it is too short.
        MismatchError: if it was recorded with other actions, written by another tokenizer, or of
            frames that the tokenizer does not take.
    """
    if path.is_file():
        return _from_picture(path, world.tokenizer, world.model.spec.actions)
    if (path / "manifest.json").is_file():
        return _from_shards(path, world, moment)
    if (path / "episodes.json").is_file():
        return _from_episodes(path, world, moment)
    found = "has neither manifest.json nor episodes.json" if path.is_dir() else "no such file"
    raise FormatError(
        f"{path}: {found}; --start takes a folder of token shards or of episodes, or a picture"
    )


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


def _from_picture(path: Path, tokenizer: VideoTokenizer, actions: ActionSpec) -> Start:
    """Encode a picture as a prompt of one frame."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            frame = np.array(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise FormatError(f"{path}: not a readable picture ({error})") from error
    require_size((frame.shape[0], frame.shape[1]), tokenizer.spec, where=path)
    frames = fit(frame[None], tokenizer.spec)
    none = np.zeros((0, actions.num_slots), np.int64)
    return Start(_encode(frames, tokenizer), none, none, None, path.name)


def _from_shards(path: Path, world: World, moment: Moment) -> Start:
    """Take the codes of a moment of an episode in token shards."""
    shards = TokenShards(path)
    world.tokenizer.spec.require(shards.tokenizer, here="the tokenizer", there=str(path))
    require_actions(world.model, shards.actions, where=str(path))
    keys = [row.key for row in shards.episodes]
    held_out = [keys[index] for index in shards.split("validation")]
    key = _pick(moment.episode, keys, held_out, where=path)
    index = keys.index(key)
    row = shards.episodes[index]
    first = _first_latent(moment, row.num_frames, world.model, where=f"{path}: {key}")
    codes_thw = torch.from_numpy(shards.codes_thw(index, first).astype(np.int64))
    num_frames = row.num_frames - moment.start_frame
    frames_BTHWC = world.tokenizer.decode(codes_thw[None], num_frames=num_frames)
    start = moment.start_frame
    known = row.labelled and shards.actions == world.model.spec.actions
    slots_TA = shards.slots_TA(index, start) if known else None
    return _cut(world, moment, key, (codes_thw, slots_TA, frames_BTHWC[0].cpu().numpy()))


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
        frames = fit(opened.frames(), world.tokenizer.spec)
        known = episodes.spec.actions == world.model.spec.actions
        slots_TA = opened.slots_TA if known else None
    codes_thw = _encode(frames, world.tokenizer)[first:]
    start = moment.start_frame
    slots_TA = None if slots_TA is None else slots_TA[start:]
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


def _encode(frames_THWC: Frames, tokenizer: VideoTokenizer) -> torch.Tensor:
    """Return codes_thw of one video."""
    return tokenizer.encode(torch.from_numpy(np.ascontiguousarray(frames_THWC))[None])[0].cpu()


def _cut(
    world: World, moment: Moment, key: str, rest: tuple[torch.Tensor, SlotArray | None, Frames]
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
