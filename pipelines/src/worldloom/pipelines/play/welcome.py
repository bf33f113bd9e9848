"""What a page is told of a world when it comes: names, sizes, controls, what can be chosen.

PlaySession, Controls, companions  ->  welcome_of  ->  the fields of `welcome` that never change
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from worldloom.dynamics import decoders_of

from .controls import Controls
from .protocol import VERSION, WINDOW_STEPS

if TYPE_CHECKING:
    from .session import PlaySession


def welcome_of(
    session: "PlaySession", controls: Controls, /, *, name: str, companions: Iterable[str]
) -> dict[str, Any]:
    """Return the fields of the message `welcome`; docs/protocol.md says what they mean.

    Args:
        session: with its world and its starts.
        controls: of that world's actions.
        name: of the world, for people.
        companions: what can be shown beside it.
    """
    model = session.world.model
    codes_spec = session.world.tokenizer.spec
    return {
        "version": VERSION,
        "world": name,
        "width": codes_spec.width,
        "height": codes_spec.height,
        "fps": model.spec.fps or None,
        "controls": [asdict(control) for control in controls.controls],
        "starts": [
            {"label": point.label, "url": f"/start/{number}.png"}
            for number, point in enumerate(session.starts)
        ],
        "decoders": list(decoders_of(model.config.order)),
        "can_act": session.can_act,
        "guidable": model.spec.actions.num_slots > 0,
        "companions": list(companions),
        "context_frames": model.config.context_frames,
        "window": WINDOW_STEPS * session.world.steps_per_latent,
    }
