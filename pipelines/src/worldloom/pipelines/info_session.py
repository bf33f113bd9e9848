"""A play session -> a description: which world, from where, how long, what was pressed.

    SESSION/{session.json, events.jsonl}  ->  describe_session  ->  {"world": ..., "num_steps": ...}

Every line is checked, but nothing is played: that is `worldloom replay`. Needs no torch.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from worldloom.common import FormatError, file_sha256

from .action_sources import action_words
from .play.session_log import Event, RecordedSession, Reset, Rewind, Settings, Step

_WORDS = 16
"""Actions listed, the most frequent ones: with several keys or axes there may be thousands."""
_STARTS = 8


@dataclass(slots=True)
class _Counts:
    """What happened, in numbers."""

    starts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    steps: int = 0
    rewinds: int = 0
    settings: int = 0
    resets: int = 0
    actions: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def add(self, event: Event, /) -> None:
        """Count one event."""
        match event:
            case Reset():
                self.resets += 1
                if len(self.starts) < _STARTS:
                    self.starts.append(event.start)
                    self.seeds.append(event.seed)
            case Step():
                self.steps += 1
                self.actions.update(map(tuple, event.slots_rA.tolist()))
            case Settings():
                self.settings += 1
            case Rewind():
                self.rewinds += 1


def describe_session(folder: Path, verify: bool, /) -> dict[str, Any]:
    """Describe a play session; with `verify`, compare its model, if that is there, with its hash.

    Raises:
        FormatError: if it is not one, or damaged; or if its model was replaced.
    """
    recorded, counts = RecordedSession(folder), _Counts()
    for _, event in recorded.events():
        counts.add(event)
    header = recorded.header
    config = recorded.model / "config.json"
    if verify and config.is_file() and file_sha256(config) != header.model_sha256:
        raise FormatError(
            f"{recorded.model}: is another model than the one that was played, so that the session "
            "cannot be replayed with it"
        )
    num_frames = counts.steps * recorded.codes.frames_per_latent
    return {
        "world": header.world,
        "model": str(recorded.model),
        "tokenizer": str(recorded.tokenizer or ""),
        "fingerprint": header.fingerprint,
        "began": header.began,
        "device": header.device,
        "fps": header.fps,
        "num_starts": counts.resets,
        "start": counts.starts,
        "seeds": counts.seeds,
        "num_steps": counts.steps,
        "num_frames": num_frames,
        "seconds": num_frames / header.fps if header.fps else None,
        "num_rewinds": counts.rewinds,
        "num_settings": counts.settings,
        "last_line_cut_short": recorded.torn,
        "actions": _pressed(recorded, counts),
        "versions": dict(header.versions),
        "verified": verify,
    }


def _pressed(recorded: RecordedSession, counts: _Counts) -> dict[str, Any]:
    """Return how often each action was done, the most frequent first."""
    spec = recorded.actions
    often = counts.actions.most_common(_WORDS)
    slots_TA = np.array([slots for slots, _ in often], np.int64).reshape(-1, spec.num_slots)
    words = action_words(spec, slots_TA)
    histogram: Counter[str] = Counter()  # two actions of a fine axis may read alike
    for word, (_, times) in zip(words, often, strict=True):
        histogram[word] += times
    return {
        "kind": spec.kind,
        "steps": counts.actions.total(),
        "histogram": dict(histogram.most_common()),
    }
