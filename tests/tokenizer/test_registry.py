"""Promises of registry.py: kinds are found among what is installed, and a file imports nothing."""

import sys
from pathlib import Path

import pytest
import torch
from tokenizer.toys import random_frames
from worldloom.common import ConfigError, FormatError, MismatchError, save_model
from worldloom.tokenizer import ImageTokenizer, load_tokenizer

THIRD_PARTY = """
from worldloom.tokenizer import ImageTokenizer

class Theirs:
    def __init__(self, folder, device):
        self.folder, self.device = folder, device

    @classmethod
    def from_pretrained(cls, folder, /, *, device="cpu"):
        return cls(folder, device)
"""


def install(site: Path, distribution: str, name: str, value: str) -> None:
    """Install a distribution with one entry point, as pip would leave it."""
    about = site / f"{distribution}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[worldloom.tokenizers]\n{name} = {value}\n")


def save_kind(folder: Path, name: object) -> Path:
    save_model(folder, kind="tokenizer", config={"name": name}, weights={}, card="")
    return folder


def test_ours_is_found_by_its_name(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model", card="")
    loaded = load_tokenizer(tmp_path / "model")
    assert type(loaded) is ImageTokenizer
    frames_BTHWC = random_frames(1, 3, 16, 24)
    assert torch.equal(loaded.encode(frames_BTHWC), tokenizer.encode(frames_BTHWC))


def test_an_installed_tokenizer_of_somebody_else_is_found(tmp_path, monkeypatch):
    install(tmp_path / "site", "their-tokenizer", "theirs", "their_tokenizer_module:Theirs")
    (tmp_path / "site" / "their_tokenizer_module.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path / "site")
    folder = save_kind(tmp_path / "model", "theirs")
    loaded = load_tokenizer(folder, device="cuda:1")
    assert type(loaded).__name__ == "Theirs"
    assert (loaded.folder, loaded.device) == (folder, "cuda:1")


@pytest.mark.parametrize("name", ["unheard-of", "canary:Canary", "image ", "", None, 3, ["image"]])
def test_a_name_that_is_not_installed_is_refused_and_nothing_is_imported(
    tmp_path, monkeypatch, name
):
    (tmp_path / "canary.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MismatchError, match=r"installed are image.*; install the package"):
        load_tokenizer(save_kind(tmp_path / "model", name))
    assert "canary" not in sys.modules


def test_a_name_that_two_packages_claim_is_refused(tmp_path, monkeypatch):
    install(tmp_path / "site", "one-more", "image", "somewhere.else:ImageTokenizer")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ConfigError, match=r"two packages .*somewhere\.else:ImageTokenizer.*"):
        load_tokenizer(save_kind(tmp_path / "model", "image"))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"config\.json: not found; expected the config of a tok"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_run_directory_is_refused_with_the_folder_that_was_meant(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "model", card="")
    with pytest.raises(FormatError, match=r"run directory; the tokenizer is its folder model: .*"):
        load_tokenizer(tmp_path / "run")


def test_another_kind_of_model_is_refused(tmp_path):
    save_model(tmp_path / "model", kind="dynamics", config={}, weights={}, card="")
    with pytest.raises(MismatchError, match="holds a 'dynamics' model, but a tokenizer is needed"):
        load_tokenizer(tmp_path / "model")


def test_a_config_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "tokenizer", "config": []}')
    with pytest.raises(MismatchError, match="a tokenizer of kind None"):
        load_tokenizer(tmp_path)
