"""Held-out windows and a model in training -> a picture: what was true above what it made of it.

    shards, tokenizer  ->  painter  ->  draw(model, update)  ->  RUN/samples/step-00000200.png

Each window is two rows: the true frames, with the action that led to each above it, and the frames
that the model rolled out freely from the first few, which are marked as given. The windows and the
noise are the same in every picture of a run, so that pictures compare.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from worldloom.common import ActionSpec, TokenShards, write_bytes
from worldloom.dynamics import (
    NULL,
    DynamicsModel,
    DynamicsSpec,
    SamplingConfig,
    StreamConfig,
    generate_codes,
    open_held_out,
)
from worldloom.tokenizer import VideoTokenizer, load_tokenizer

from .pictures import Strip, draw_sheet, encode_png, fitting_scale

_WINDOWS = 4
_LOOKED_AT = 64
_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class _Window:
    """One held-out window, without its padding."""

    codes_1thw: Tensor
    slots_1TA: Tensor


def tokenizer_of(shards: Sequence[TokenShards], name: str, /) -> VideoTokenizer:
    """Load the tokenizer that is said to be that of the shards.

    Raises:
        MismatchError: if the shards are another tokenizer's.
    """
    tokenizer = load_tokenizer(name)
    for one in shards:
        tokenizer.spec.require(one.tokenizer, here=name, there=str(one.folder))
    return tokenizer


def painter(  # noqa: PLR0913 - what is drawn, by what, and where to
    shards: Sequence[TokenShards],
    folder: Path,
    /,
    *,
    decoder: VideoTokenizer,
    window_frames: int,
    seed: int,
    stream: StreamConfig | None,
) -> Callable[[DynamicsModel, int], None]:
    """Return what draws a picture of each validation.

    Args:
        shards: one folder or several; windows are taken from the held-out part of each.
        folder: where pictures go.
        decoder: the tokenizer of the shards.
        window_frames: latent frames of a window; a quarter of them is given to the model.
        seed: of the choice of windows.
        stream: where the shards' tars are, if not in their folders.
    """
    actions = DynamicsSpec.of(*shards).actions
    windows: list[_Window] = []
    for one in shards:
        held_out = open_held_out(one, window_frames=window_frames, stream=stream, actions=actions)
        batch = held_out.batch(0, size=_LOOKED_AT, seed=seed)
        # The longest first: of others there is less to see.
        lengths = batch.valid_Bt.sum(1)
        for row in lengths.argsort(descending=True, stable=True)[: -(-_WINDOWS // len(shards))]:
            length = int(lengths[row])
            steps = (length - 1) * one.codes.frames_per_latent
            windows.append(
                _Window(
                    batch.codes_Bthw[row : row + 1, :length], batch.slots_BTA[row, :steps][None]
                )
            )
    codes = shards[0].codes
    prompt_frames = max(1, window_frames // 4)

    def draw(model: DynamicsModel, step: int) -> None:
        strips = []
        for number, window in enumerate(windows, start=1):
            generated_1thw = generate_codes(
                model,
                window.codes_1thw[:, :prompt_frames],
                window.slots_1TA,
                seeds=[number],
                sampling=SamplingConfig(),
            ).cpu()
            count = codes.pixel_frames(window.codes_1thw.shape[1])
            given = codes.pixel_frames(min(prompt_frames, window.codes_1thw.shape[1]))
            true, made = (
                decoder.decode(codes_1thw, num_frames=count).cpu().numpy()[0]
                for codes_1thw in (window.codes_1thw, generated_1thw)
            )
            labels = ["", *action_labels(actions, window.slots_1TA[0])][:count]
            marks = ["given"] * given + [f"+{i}" for i in range(1, count - given + 1)]
            strips.append(Strip(title=f"{number}  true", frames_THWC=true, labels=labels))
            strips.append(Strip(title="generated", frames_THWC=made, labels=marks))
        scale = fitting_scale(*strips[0].frames_THWC.shape[1:3], target=136)
        sheet = draw_sheet(strips, scale=scale, columns=_COLUMNS)
        write_bytes(folder / f"step-{step:08d}.png", encode_png(sheet))

    return draw


def action_labels(actions: ActionSpec, slots_TA: Tensor, /) -> list[str]:
    """Return what each step's action is called; of one that nobody knows a question mark."""
    if actions.num_slots == 0:
        return [""] * len(slots_TA)
    known_T = (slots_TA != NULL).all(1)
    # Null is no action that has a name: any other stands in for it, and is not shown.
    words = actions.describe(torch.where(known_T[:, None], slots_TA, 0).numpy())
    return [word if known else "?" for word, known in zip(words, known_T.tolist(), strict=True)]
