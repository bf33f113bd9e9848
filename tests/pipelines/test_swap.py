"""Tokenizers are swapped by a folder: one dynamics command, shards of any, and no mixing."""

import pytest
from chain_worlds import DYNAMICS_FLAGS, save_tokenizer, write_pushed_squares
from command_server import CommandServer
from worldloom.tokenizer import ConvTokenizer, QuantizerConfig, TokenizerConfig, Trained
from worldloom.tokenizer.patch import PatchConfig, PatchTokenizer

pytestmark = pytest.mark.slow
NAMES = ("image-vq", "video-fsq", "patch")


def make(name: str, folder):
    """Write a tokenizer of 16x16 frames of one of three kinds that differ in all they can."""
    if name == "image-vq":
        return save_tokenizer(folder)
    if name == "patch":
        PatchTokenizer(PatchConfig(height=16, width=16, patch=8)).save(folder, card="")
        return folder
    config = TokenizerConfig(
        height=16,
        width=16,
        architecture="video",
        temporal_stride=2,
        widths=(8,),
        num_blocks=(1,),
        quantizer=QuantizerConfig(kind="fsq", fsq_levels=(5, 3)),
    )
    tokenizer = ConvTokenizer(config, trained=Trained(fps=8.75, frame_skip=4))
    tokenizer.eval().save(folder, card="")
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory, commands: CommandServer):
    """A folder with episodes, and for each kind its tokenizer, shards and dynamics."""
    folder = tmp_path_factory.mktemp("swap")
    write_pushed_squares(folder / "episodes", (12, 13, 14, 15, 16, 17, 18, 19, 20, 21))
    for name in NAMES:
        here = folder / name
        make(name, here / "tokenizer")
        for words in (
            ("tokenize", "--device", "cpu", "--episodes", folder / "episodes",
             "--tokenizer", here / "tokenizer", "--output", here / "shards"),
            ("train-dynamics", *DYNAMICS_FLAGS, "--training.num-steps", 2,
             "--shards", here / "shards", "--output", here / "dynamics"),
        ):  # fmt: skip
            ended = commands.run(*words)
            assert ended.code == 0, ended.err
    return folder


def generate(commands, folder, model, tokenizer):
    return commands.run(
        "generate", "--device", "cpu", "--model", folder / model / "dynamics" / "model",
        "--tokenizer", folder / tokenizer / "tokenizer", "--start", folder / tokenizer / "shards",
        "--actions", "LEFT*3,RIGHT*3", "--output", folder / f"{model}-{tokenizer}",
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_same_commands_serve_every_tokenizer(chain, commands, name):
    ended = generate(commands, chain, name, name)
    assert ended.code == 0, ended.err
    assert (chain / f"{name}-{name}").is_dir()


@pytest.mark.parametrize(
    ("model", "tokenizer", "fields"),
    [
        ("image-vq", "patch", ("name", "codes.vocab_size", "codes.grid_height", "fingerprint")),
        ("video-fsq", "image-vq", ("name", "codes.frames_per_latent", "fingerprint")),
        ("patch", "video-fsq", ("name", "codes.code_dim", "fingerprint")),
    ],
)
def test_the_wrong_tokenizer_is_refused_naming_what_differs(
    chain, commands, model, tokenizer, fields
):
    ended = generate(commands, chain, model, tokenizer)
    assert ended.code == 3
    for field in fields:
        assert f"{field} (" in ended.err
    assert not (chain / f"{model}-{tokenizer}").exists()


def test_a_tokenizer_of_other_weights_alone_is_refused_by_its_fingerprint(chain, commands):
    save_tokenizer(chain / "other" / "tokenizer", seed=1)
    ended = commands.run(
        "generate", "--device", "cpu", "--model", chain / "image-vq" / "dynamics" / "model",
        "--tokenizer", chain / "other" / "tokenizer", "--start", chain / "image-vq" / "shards",
        "--actions", "LEFT", "--output", chain / "never",
    )  # fmt: skip
    assert ended.code == 3
    assert "They differ in fingerprint (" in ended.err
