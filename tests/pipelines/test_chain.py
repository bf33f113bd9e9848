"""The whole chain through the command line: from a game whose answers are known to its world."""

import json
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chain_worlds import save_tokenizer
from command_server import Ended
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    Episodes,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import NULL, Windows
from worldloom.tokenizer import load_tokenizer
from worlds import shown_action, shown_step

SETTINGS = """
[record]
env = "worlds:LastAction-v0"
env_kwargs = "length=20"
num_episodes = 12
height = 16
width = 16
policy = "random"

[train_tokenizer]
device = "cpu"
[train_tokenizer.model]
height = 16
width = 16
widths = [16]
num_blocks = [1]
[train_tokenizer.model.quantizer]
vocab_size = 32
code_dim = 4
[train_tokenizer.training]
num_steps = 40
batch_clips = 4
clip_frames = 4
warmup_steps = 4

[tokenize]
shard_episodes = 5
device = "cpu"

[train_dynamics]
cpu = true
[train_dynamics.model]
num_layers = 1
dim = 32
num_heads = 2
context_frames = 6
num_meta_tokens = 2
[train_dynamics.training]
num_steps = 30
batch_windows = 4
window_frames = 6
warmup_steps = 4

[generate]
horizon = 6
seed = 3
[generate.sampling]
min_p = 0.0

[evaluate]
horizon = 4
num_rollouts = 4
num_first_frames = 8
held_frames = 4
"""


@dataclass(frozen=True)
class Chain:
    """A folder in which every command has run, and what each said."""

    folder: Path
    said: dict[str, Ended]

    def words(self, name: str, **flags: object) -> list[str]:
        """The command line of one command, with some flags replaced."""
        flags = {**PATHS[name], **flags}
        words = [name, "--config", str(self.folder / "chain.toml")]
        for flag, value in flags.items():
            place = self.folder / value if isinstance(value, str) and "/" in value else value
            words += [f"--{flag}", str(place)]
        return words


PATHS = {
    "record": {"output": "./episodes"},
    "train-tokenizer": {"episodes": "./episodes", "output": "./tokenizer"},
    "tokenize": {
        "episodes": "./episodes", "tokenizer": "tokenizer/model", "output": "./shards",
    },
    "train-dynamics": {"shards": "./shards", "output": "./dynamics"},
    "generate": {
        "model": "dynamics/model", "tokenizer": "tokenizer/model", "start": "./shards",
        "actions": "random", "output": "./generated",
    },
    "evaluate": {
        "model": "dynamics/model", "tokenizer": "tokenizer/model", "episodes": "./episodes",
        "shards": "./shards", "output": "./evaluation",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def chain(commands, tmp_path_factory) -> Chain:
    """Every command once, each in a process of its own."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "chain.toml").write_text(SETTINGS)
    chain = Chain(folder, {})
    for name in PATHS:
        chain.said[name] = commands.run(*chain.words(name))
        assert chain.said[name].code == 0, chain.said[name].err
    return chain


@pytest.mark.slow
def test_every_command_prints_what_it_wrote_and_leads_to_the_next(chain):
    written = {
        "record": "episodes", "train-tokenizer": "tokenizer/model", "tokenize": "shards",
        "train-dynamics": "dynamics/model", "generate": "generated",
        "evaluate": "evaluation/evaluation.json",
    }  # fmt: skip
    for name, path in written.items():
        assert chain.said[name].out == f"{chain.folder / path}\n"
        assert (chain.folder / path).exists()
        assert "\\n" not in chain.said[name].err
    for name, following in pairwise(list(written)[:5]):
        (line,) = re.findall(r"^next: worldloom (\S+)", chain.said[name].err, re.MULTILINE)
        assert line == following


@pytest.mark.slow
def test_info_knows_everything_that_the_chain_has_written(chain, commands):
    kinds = {}
    for part in ("episodes", "tokenizer", "tokenizer/model", "shards", "dynamics/model"):
        ended = commands.run("info", chain.folder / part, "--json")
        assert ended.code == 0, ended.err
        kinds[part] = json.loads(ended.out)["kind"]
    assert len(set(kinds.values())) >= 4, kinds
    assert commands.run("info", chain.folder / "chain.toml").code == 3


@pytest.mark.slow
def test_slot_i_of_the_shards_is_the_action_that_frame_i_plus_1_shows(chain):
    episodes, shards = Episodes(chain.folder / "episodes"), TokenShards(chain.folder / "shards")
    assert len(shards.episodes) == 12
    seen = set()
    for index, row in enumerate(shards.episodes):
        with episodes.open(row.key) as episode:
            frames_THWC = episode.frames()
        assert len(frames_THWC) == row.num_frames == 21
        assert [shown_step(frame) for frame in frames_THWC] == list(range(21))
        shown = [shown_action(frame) for frame in frames_THWC]
        assert shown[0] is None
        assert shards.slots_TA(index)[:, 0].tolist() == shown[1:]
        seen |= set(shown[1:])
    assert seen == {0, 1, 2, 3}


@pytest.mark.slow
def test_what_a_generated_video_was_pressed_is_what_its_session_says(chain):
    session = json.loads((chain.folder / "generated/session.json").read_text())
    with np.load(chain.folder / "generated/codes.npz") as written:
        assert written["actions"].tolist() == session["actions"]
        assert written["codes"].shape[1] == session["prompt_frames"] + 6
    shards = TokenShards(chain.folder / "shards")
    (index,) = [i for i, row in enumerate(shards.episodes) if row.key in session["start"]]
    assert shards.episodes[index].split == "validation"
    prompt_frames = session["prompt_frames"]
    # The prompt's actions lead from each of its frames to the next.
    assert session["prompt_actions"] == shards.slots_TA(index)[: prompt_frames - 1].tolist()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_codes_in_another_process_and_another_seed_does_not(
    chain, commands, tmp_path
):
    codes = [np.load(chain.folder / "generated/codes.npz")["codes"]]
    for seed in (3, 4):
        output = tmp_path / str(seed)
        ended = commands.run(*chain.words("generate", seed=seed, output=f"{output}"))
        assert ended.code == 0, ended.err
        codes.append(np.load(output / "codes.npz")["codes"])
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "evaluate", "train-dynamics"])
def test_another_tokenizer_is_refused_with_both_fingerprints_and_what_differs(
    chain, commands, tmp_path, name
):
    other = save_tokenizer(tmp_path / "other")
    mine, theirs = (
        load_tokenizer(folder).spec.fingerprint
        for folder in (chain.folder / "tokenizer/model", other)
    )
    words = chain.words(name, tokenizer=f"{other}", output=f"{tmp_path}/output")
    ended = commands.run(*words)
    assert ended.code == 3
    (line,) = ended.err.strip().splitlines()
    assert mine[:16] in line
    assert theirs[:16] in line
    for field in ("fingerprint", "codes.vocab_size"):
        assert field in line
    assert "codes.grid_height" not in line  # it is the same
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_bad_input_of_any_kind_ends_with_its_code_and_one_sentence(chain, commands, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in (chain.folder / "shards").iterdir():
        content = path.read_bytes()
        (cut / path.name).write_bytes(content[:-512] if path.name.endswith("1.tar") else content)
    output = f"{tmp_path}/output"
    cases = [
        (chain.words("train-tokenizer", episodes=f"{nothing}", output=output), 3, str(nothing)),
        (chain.words("train-dynamics", shards=f"{cut}", output=output), 3, "shard-000001.tar"),
        (chain.words("train-dynamics", shards=f"{nothing}", output=output), 3, str(nothing)),
        (chain.words("generate", model=f"{nothing}", output=output), 3, str(nothing)),
        (chain.words("evaluate", episodes=f"{nothing}", output=output), 3, str(nothing)),
        ([*chain.words("evaluate", output=output), "--horizons", "3"], 2, "--horizon"),
        (["record", "--env", "NoSuchGame-v0", "--output", output], 2, "NoSuchGame"),
        (["info", str(tmp_path / "gone")], 3, str(tmp_path / "gone")),
    ]
    for words, code, said in cases:
        began = time.monotonic()
        ended = commands.run(*words)
        assert ended.code == code, (words, ended)
        assert said in ended.err
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in ended.err
        assert ended.cpu_s < 5
        assert time.monotonic() - began < 30  # others may be busy with the machine
        assert ended.out == ""
    assert not Path(output).exists()


def test_no_window_crosses_an_episode_and_every_window_is_there(tmp_path):
    # Code and action both say where they come from: 20 of episode 1, frame 4, say.
    lengths, space = (9, 2, 5, 1, 14), 16
    spec = TokenizerSpec(
        name="count",
        codes=CodeSpec(vocab_size=16 * len(lengths), grid_height=1, grid_width=2, code_dim=2),
        height=8,
        width=16,
        resize="exact",
        fps=10.0,
        frame_skip=1,
        compute_dtype="float32",
        fingerprint="0" * 64,
    )
    actions = ActionSpec.discrete([f"a{number}" for number in range(16 * len(lengths))])
    episodes = [
        TokenEpisode(
            key=f"episode-{number}",
            codes_thw=np.repeat(number * space + np.arange(length), 2).reshape(length, 1, 2),
            slots_TA=(number * space + np.arange(length - 1))[:, None],
            num_frames=length,
            split="train",
        )
        for number, length in enumerate(lengths)
    ]
    records = [
        write_shard(tmp_path, index, part, codes=spec.codes, actions=actions)
        for index, part in enumerate((episodes[:2], episodes[2:]))
    ]
    write_manifest(
        tmp_path, records, tokenizer=spec, actions=actions,
        codebook_VZ=np.zeros((spec.codes.vocab_size, 2), np.float32), fps=10.0, frame_skip=1,
        metrics={}, source={},
    )  # fmt: skip
    for window_frames in (2, 5, 8):
        windows = Windows(TokenShards(tmp_path), "train", window_frames=window_frames)
        batch = windows.take(np.arange(len(windows)))
        found = set()
        for codes_thw, slots_TA, valid_t in zip(
            batch.codes_Bthw, batch.slots_BTA, batch.valid_Bt, strict=True
        ):
            count = int(valid_t.sum())
            assert valid_t.tolist() == [True] * count + [False] * (window_frames - count)
            first = int(codes_thw[0, 0, 0])
            assert (codes_thw[:count] == first + np.arange(count)[:, None, None]).all()
            # Slot i leads from frame i to frame i + 1, and behind the end there is none.
            assert slots_TA[: count - 1, 0].tolist() == list(range(first, first + count - 1))
            assert (slots_TA[count - 1 :] == NULL).all()
            number, start = divmod(first, space)
            assert start + count <= lengths[number]
            assert count == min(window_frames, lengths[number])
            found.add((number, start))
        assert found == {
            (number, start)
            for number, length in enumerate(lengths)
            if length >= 2
            for start in range(max(1, length - window_frames + 1))
        }
