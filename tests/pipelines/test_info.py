"""info.py: every kind of folder is recognised, and its numbers are those of what was written."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    ConfigError,
    EpisodesSpec,
    EpisodeWriter,
    FormatError,
    RunLog,
    TokenEpisode,
    TokenizerSpec,
    save_checkpoint,
    save_model,
    write_manifest,
    write_shard,
)
from worldloom.pipelines.info import InfoConfig, describe, info

LENGTHS = (5, 9, 4)
ACTIONS = ActionSpec.discrete(["left", "right", "fire"])
FINGERPRINT = "ab" * 32


def write_episodes(folder, actions=ACTIONS, raw=None):
    spec = EpisodesSpec(
        actions=actions, height=6, width=8, fps=10, frame_skip=4, source={"seed": 7}
    )
    spec.write(folder)
    for number, length in enumerate(LENGTHS):
        with EpisodeWriter(folder, f"episode-{number}", spec=spec) as writer:
            for _ in range(length):
                writer.append(np.full((6, 8, 3), 40 * number, np.uint8))
            chosen = np.zeros(length - 1, np.int64) + number if raw is None else raw(length - 1)
            writer.finish(chosen, rewards=np.ones(length - 1, np.float32))
    return folder


@pytest.fixture
def episodes(tmp_path):
    return write_episodes(tmp_path / "episodes")


@pytest.fixture
def shards(tmp_path):
    codes = CodeSpec(vocab_size=10, grid_height=2, grid_width=2, code_dim=3)
    tokenizer = TokenizerSpec(
        name="image", codes=codes, height=6, width=8, resize="exact", fps=10, frame_skip=4,
        compute_dtype="float32", fingerprint=FINGERPRINT,
    )  # fmt: skip
    rows = [
        TokenEpisode(
            key=f"episode-{number}", split="validation" if number == 2 else "train",
            codes_thw=np.full((length, 2, 2), 2 * number, np.uint8), num_frames=length,
            slots_TA=np.full((length - 1, 1), number),
        )
        for number, length in enumerate(LENGTHS)
    ]  # fmt: skip
    folder = tmp_path / "shards"
    record = write_shard(folder, 0, rows, codes=codes, actions=ACTIONS)
    write_manifest(
        folder, [record], tokenizer=tokenizer, actions=ACTIONS, fps=10, frame_skip=4,
        codebook_VZ=np.zeros((10, 3), np.float32), metrics={"psnr_db": 28.5}, source={},
    )  # fmt: skip
    return folder


@pytest.fixture
def model(tmp_path):
    config = {"name": "image", "fingerprint": FINGERPRINT, "tokenizer": {"dim": 4}}
    weights = {"a": torch.zeros(3, 4), "b": torch.zeros(())}
    save_model(tmp_path / "m", kind="tokenizer", config=config, weights=weights, card="")
    return tmp_path / "m"


@pytest.fixture
def run(tmp_path):
    log = RunLog(tmp_path / "run", config=InfoConfig(path=tmp_path))
    log.metrics(10, loss=0.5, psnr_db=20.0)
    log.metrics(20, loss=0.25)
    save_checkpoint(tmp_path / "run", 20, {"model": {"a": torch.zeros(3, 4)}}, {})
    return tmp_path / "run"


def test_episodes_are_counted_by_split_and_by_action(episodes):
    about = describe(episodes)
    assert about["kind"] == "episodes"
    assert (about["num_episodes"], about["num_frames"], about["seconds"]) == (3, 18, 1.8)
    assert about["splits"] == {
        "train": {"num_episodes": 2, "num_frames": 14},
        "validation": {"num_episodes": 1, "num_frames": 4},
    }
    assert about["actions"]["histogram"] == {"left": 4, "right": 8, "fire": 3}
    assert about["episode_return"] == {"min": 3.0, "median": 4.0, "max": 8.0}


@pytest.mark.parametrize(
    ("spec", "raw", "histogram"),
    [
        (
            ActionSpec.keys(["a", "b"]),
            lambda steps: np.tile([[1, 1]], (steps, 1)) * (np.arange(steps) > 0)[:, None],
            {"none": 3, "a": 12, "b": 12},
        ),
        (
            ActionSpec.multi_discrete([2, 3], names=["x", "y"]),
            lambda steps: np.tile([[1, 2]], (steps, 1)),
            {"x": [0, 15], "y": [0, 0, 15]},
        ),
        (
            ActionSpec.continuous([-1], [1], names=["turn"], bins=3),
            lambda steps: np.full((steps, 1), 0.9, np.float32),
            {"turn": [0, 0, 15]},
        ),
        (ActionSpec.none(), lambda steps: np.zeros((steps, 0), np.int64), {}),
    ],
)
def test_every_kind_of_actions_has_a_histogram_of_what_was_chosen(tmp_path, spec, raw, histogram):
    folder = write_episodes(tmp_path / "episodes", spec, raw)
    assert describe(folder)["actions"]["histogram"] == histogram
    assert info(InfoConfig(path=folder))


def test_shards_show_fingerprint_splits_and_the_codes_that_are_used(shards):
    about = describe(shards)
    assert (about["kind"], about["fingerprint"]) == ("shards", FINGERPRINT)
    assert about["splits"]["validation"] == {"num_episodes": 1, "num_frames": 4}
    usage = about["code_usage"]
    share = np.array(LENGTHS) / sum(LENGTHS)
    assert (usage["codes_used"], usage["codes_used_fraction"]) == (3, 0.3)
    assert usage["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert about["actions"]["histogram"] == {"left": 4, "right": 8, "fire": 3}


def test_a_model_shows_its_fingerprint_its_config_and_its_parameters(model):
    about = describe(model)
    assert (about["kind"], about["fingerprint"]) == ("tokenizer", FINGERPRINT)
    assert (about["num_tensors"], about["num_parameters"]) == (2, 13)
    assert about["config"] == {"name": "image", "tokenizer": {"dim": 4}}


def test_a_run_shows_each_metric_as_last_written_and_its_checkpoints(run):
    about = describe(run)
    assert (about["kind"], about["step"]) == ("run", 20)
    assert about["last_metrics"] == {"loss": 0.25, "psnr_db": 20.0}
    assert about["checkpoints"] == ["step-00000020"]
    assert about["latest"] == "checkpoints/step-00000020"
    checkpoint = describe(run / "checkpoints" / "step-00000020")
    assert (checkpoint["kind"], checkpoint["step"]) == ("checkpoint", 20)
    assert checkpoint["groups"] == {"model": {"num_tensors": 1, "num_parameters": 12}}


def test_the_path_that_tokenize_prints_is_as_good_as_its_folder(shards):
    assert describe(shards / "manifest.json") == describe(shards)


@pytest.mark.parametrize("kind", ["shards", "model", "run"])
def test_verify_finds_a_flipped_byte_that_a_plain_look_does_not(kind, request):
    folder = request.getfixturevalue(kind)
    name = {"shards": "*.tar", "model": "*.safetensors", "run": "checkpoints/*/*.safetensors"}[kind]
    (victim,) = folder.glob(name)
    assert describe(folder, verify=True)["verified"]
    content = bytearray(victim.read_bytes())
    # The last byte of a tensor; of a tar, one of the zeros that fill its last block.
    content[-1] ^= 1
    victim.write_bytes(content)
    describe(folder)
    with pytest.raises(FormatError, match=victim.name):
        describe(folder, verify=True)


def test_verify_finds_a_damaged_frame(episodes):
    victim = episodes / "episode-1.npz"
    content = bytearray(victim.read_bytes())
    content[80:90] = bytes(10)
    victim.write_bytes(content)
    with pytest.raises(FormatError, match=r"episode-1.npz"):
        describe(episodes, verify=True)


def test_a_path_that_is_nothing_of_ours_is_refused_saying_what_was_expected(tmp_path, episodes):
    with pytest.raises(FormatError, match="no such file or folder; expected a folder of episodes"):
        describe(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"expected .* found none of their files$"):
        describe(tmp_path / "empty")
    with pytest.raises(FormatError, match=r"inside it there are episodes \(episodes\)"):
        describe(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]"]
)
def test_weights_with_a_forged_header_are_refused(model, content):
    path = model / "model.safetensors"
    config = json.loads((model / "config.json").read_text())
    config["files"][path.name]["size_bytes"] = len(content)
    (model / "config.json").write_text(json.dumps(config))
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not readable as safetensors"):
        describe(model)


@pytest.mark.parametrize("kind", ["episodes", "shards", "model", "run"])
def test_json_is_what_describe_returns_and_the_text_says_what_it_is(kind, request):
    folder = request.getfixturevalue(kind)
    about = describe(folder)
    assert json.loads(info(InfoConfig(path=folder, json=True))) == about
    assert info(InfoConfig(path=folder)).startswith(
        f"{folder}: a" if kind != "shards" else str(folder)
    )


def test_the_preview_shows_the_frames_themselves(episodes, tmp_path):
    info(InfoConfig(path=episodes, preview=tmp_path / "p.png"))
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    for number, length in enumerate(LENGTHS):
        area = length * (6 * 18) * (8 * 18)  # frames of 6x8, enlarged 18 times
        same = (picture == 40 * number).all(-1).sum()
        assert same >= area


def test_a_preview_of_what_has_no_frames_is_refused(shards, tmp_path):
    with pytest.raises(ConfigError, match="only episodes have frames"):
        info(InfoConfig(path=shards, preview=tmp_path / "p.png"))
    assert not (tmp_path / "p.png").exists()


def test_info_needs_no_torch(episodes, shards):
    code = (
        "import sys; from worldloom.pipelines.cli import main\n"
        "ended = [main(['info', path, '--verify']) for path in sys.argv[1:]]\n"
        "sys.exit(any(ended) or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(episodes), str(shards)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
