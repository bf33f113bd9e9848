"""A whole chain in miniature, with real models of random weights: a square that is pushed about."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_server import CommandServer
from worldloom.common import (
    ActionSpec,
    Episodes,
    EpisodesSpec,
    EpisodeWriter,
    TokenEpisode,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import DynamicsConfig, DynamicsModel, DynamicsSpec
from worldloom.pipelines.evaluate import EvaluateConfig, evaluate
from worldloom.tokenizer import ConvTokenizer, QuantizerConfig, TokenizerConfig, Trained

SQUARE_ACTIONS = ActionSpec.discrete(["STAY", "LEFT", "RIGHT"])


def square_episode(num_frames, seed):
    """Frames in which a light square of 4x4 moves by 2 as pushed, and the pushes."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(0, 3, num_frames - 1)
    column, frames = 6, np.full((num_frames, 16, 16, 3), 30, np.uint8)
    for index in range(num_frames):
        if index:
            column = int(np.clip(column + (0, -2, 2)[actions[index - 1]], 0, 12))
        frames[index, 6:10, column : column + 4] = (240, 200, 60)
    return frames, actions


@dataclass(frozen=True)
class TinyChain:
    """What every stage up to the training wrote."""

    folder: Path
    tokenizer: ConvTokenizer
    model: DynamicsModel

    @property
    def paths(self):
        """The settings that generate and evaluate have in common."""
        return {"model": self.folder / "model", "tokenizer": str(self.folder / "tokenizer")}


@pytest.fixture(scope="session")
def build_tokenizer():
    """Build a tokenizer of random weights, with a codebook."""
    return _build_tokenizer


def _build_tokenizer(seed=0):
    config = TokenizerConfig(
        height=16,
        width=16,
        resize="stretch",
        widths=(8,),
        num_blocks=(1,),
        quantizer=QuantizerConfig(vocab_size=16, code_dim=4),
    )
    tokenizer = ConvTokenizer(config, trained=Trained(fps=8.75, frame_skip=4), seed=seed)
    # k-means on the first batch is what gives a codebook its entries.
    tokenizer.train()
    frames = torch.from_numpy(np.concatenate([square_episode(9, 900 + i)[0] for i in range(4)]))
    with torch.no_grad():
        tokenizer(frames[None].movedim(-1, 1).float() / 127.5 - 1)
    return tokenizer.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory) -> TinyChain:
    """Twelve episodes (one held out), their shards, a tokenizer and a model."""
    folder = tmp_path_factory.mktemp("chain")
    spec = EpisodesSpec(
        actions=SQUARE_ACTIONS,
        height=16,
        width=16,
        fps=8.75,
        frame_skip=4,
        source={"env": "square"},
    )
    episodes_folder = folder / "episodes"
    episodes_folder.mkdir()
    spec.write(episodes_folder)
    for number in range(12):
        frames, actions = square_episode(20 + number, number)
        with EpisodeWriter(episodes_folder, f"episode-{number:06d}", spec=spec) as writer:
            for frame in frames:
                writer.append(frame)
            writer.finish(actions)
    tokenizer = _build_tokenizer()
    tokenizer.save(folder / "tokenizer", card="tiny")
    tokens = []
    episodes = Episodes(episodes_folder)
    for key in episodes.keys:
        with episodes.open(key) as episode:
            frames_THWC = torch.from_numpy(episode.frames())
            tokens.append(
                TokenEpisode(
                    key=key,
                    codes_thw=tokenizer.encode(frames_THWC[None])[0].numpy(),
                    slots_TA=spec.actions.encode(episode.actions),
                    num_frames=episode.num_frames,
                    split="validation" if key in episodes.split("validation") else "train",
                )
            )
    codes = tokenizer.spec.codes
    (folder / "shards").mkdir()
    record = write_shard(folder / "shards", 0, tokens, codes=codes, actions=spec.actions)
    codebook_VZ = tokenizer.codebook.numpy()
    write_manifest(
        folder / "shards",
        [record],
        tokenizer=tokenizer.spec,
        actions=spec.actions,
        codebook_VZ=codebook_VZ,
        fps=spec.fps,
        frame_skip=spec.frame_skip,
        metrics={},
        source={},
    )
    model = DynamicsModel(
        DynamicsConfig(num_layers=2, dim=32, num_heads=2, context_frames=6, num_meta_tokens=2),
        DynamicsSpec(
            tokenizer=tokenizer.spec, actions=spec.actions, fps=spec.fps, frame_skip=spec.frame_skip
        ),
        codebook_VZ,
        seed=1,
    ).eval()
    with torch.no_grad():  # fresh weights hardly listen; these do, at random
        model.actions.table.weight.mul_(50)
        model.head.to_logits.weight.mul_(20)
        model.cell.weight.mul_(25)
    model.save(folder / "model", card="tiny")
    return TinyChain(folder, tokenizer, model)


@pytest.fixture(scope="session")
def commands() -> Iterator[CommandServer]:
    """Starts commands in processes of their own that may be killed."""
    with CommandServer() as server:
        yield server


@dataclass(frozen=True)
class Evaluated:
    """What evaluate wrote of the tiny chain."""

    numbers: dict[str, Any]
    folder: Path
    settings: dict[str, int]


@pytest.fixture(scope="session")
def evaluated(tiny_chain, tmp_path_factory) -> Evaluated:
    """One evaluation of the tiny chain."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    settings = {
        "horizon": 5, "prompt_frames": 3, "held_frames": 4, "num_rollouts": 6, "batch": 4
    }  # fmt: skip
    path = evaluate(
        EvaluateConfig(
            **tiny_chain.paths,
            **settings,
            episodes=tiny_chain.folder / "episodes",
            shards=tiny_chain.folder / "shards",
            output=folder,
        )
    )
    assert path == folder / "evaluation.json"
    return Evaluated(json.loads(path.read_text()), folder, settings)
