"""Promises of registry.py: what a person names is found, and a file imports nothing."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from tokenizer.toys import random_frames
from worldloom.common import ConfigError, FormatError, MismatchError, save_model
from worldloom.tokenizer import ConvTokenizer, load_tokenizer
from worldloom.tokenizer.patch import PatchTokenizer

THIRD_PARTY = """
import torch
from worldloom.tokenizer.patch import PatchTokenizer

class Theirs(PatchTokenizer):
    folder = None
    made_on = None

    @classmethod
    def from_pretrained(cls, folder, /, *, device="cpu"):
        tokenizer = cls()
        tokenizer.folder, tokenizer.made_on = folder, device
        return tokenizer

class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        inner = PatchTokenizer()
        self.spec, self.codebook, self.fingerprint = inner.spec, inner.codebook, inner.fingerprint
        self.encode, self.decode = inner.encode, inner.decode
        self.open_encoder, self.open_decoder = inner.open_encoder, inner.open_decoder

class NeedsSizes(Theirs):
    def __init__(self, height):
        super().__init__()

class NotATokenizer:
    def encode(self, frames):
        return frames

not_a_class = PatchTokenizer()
"""


@pytest.fixture
def their_module(tmp_path, monkeypatch) -> str:
    """The name of a module of somebody else's, in the folder where the person stands."""
    stand = tmp_path / "stand"
    stand.mkdir()
    name = "theirs_" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    (stand / f"{name}.py").write_text(THIRD_PARTY)
    monkeypatch.chdir(stand)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


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
    assert type(loaded) is ConvTokenizer
    frames_BTHWC = random_frames(1, 3, 16, 24)
    assert torch.equal(loaded.encode(frames_BTHWC), tokenizer.encode(frames_BTHWC))


def test_an_installed_tokenizer_of_somebody_else_is_found(tmp_path, monkeypatch):
    install(tmp_path / "site", "their-tokenizer", "theirs", "their_tokenizer_module:Theirs")
    (tmp_path / "site" / "their_tokenizer_module.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path / "site")
    folder = save_kind(tmp_path / "model", "theirs")
    loaded = load_tokenizer(folder, device="cuda:1")
    assert type(loaded).__name__ == "Theirs"
    assert (loaded.folder, loaded.made_on) == (folder, "cuda:1")


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
    install(tmp_path / "site", "one-more", "image", "somewhere.else:ConvTokenizer")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ConfigError, match=r"two packages .*somewhere\.else:ConvTokenizer.*"):
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


def test_an_installed_name_that_needs_no_folder_is_made_with_no_arguments():
    assert type(load_tokenizer("patch")) is PatchTokenizer


def test_a_class_that_a_person_types_is_made_with_no_arguments(their_module):
    loaded = load_tokenizer(f"{their_module}:Theirs")
    assert type(loaded).__name__ == "Theirs"
    assert loaded.folder is None


def test_a_class_and_a_folder_that_a_person_types_go_together(their_module, tmp_path):
    loaded = load_tokenizer(f"{their_module}:Theirs={tmp_path}/a=b", device="cuda:1")
    assert (loaded.folder, loaded.made_on) == (tmp_path / "a=b", "cuda:1")


def test_a_torch_module_made_with_no_arguments_goes_to_the_device_and_does_not_train(their_module):
    loaded = load_tokenizer(f"{their_module}:Learned", device="meta")
    assert loaded.layer.weight.is_meta
    assert not loaded.training
    assert not loaded.layer.weight.requires_grad


def test_a_folder_that_is_there_wins_over_a_name(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.save(tmp_path / "patch", card="")
    assert type(load_tokenizer("patch")) is ConvTokenizer
    assert type(load_tokenizer("./patch")) is ConvTokenizer


def test_a_path_is_never_taken_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=r"patch/config\.json: not found"):
        load_tokenizer(Path("patch"))


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("ptach", FormatError, "ptach: no such folder, and no tokenizer .* did you mean 'patch'"),
        ("runs/model", FormatError, r"runs/model/config\.json: not found"),
        ("image", ConfigError, "image: ConvTokenizer cannot be made with no arguments .*config"),
        ("no_such_module:Class", ConfigError, r"cannot be imported \(ModuleNotFoundError"),
        ("{}:Nobody", ConfigError, r"cannot be imported \(AttributeError"),
        ("{}:not_a_class", ConfigError, "is PatchTokenizer, must be a class"),
        ("{}:NeedsSizes", ConfigError, "NeedsSizes cannot be made with no arguments .*height"),
        ("{}:NotATokenizer", ConfigError, "lacks codebook, decode, fingerprint, open_decoder"),
        ("{}:NotATokenizer=folder", ConfigError, "NotATokenizer has no from_pretrained"),
    ],
)
def test_what_cannot_be_made_into_a_tokenizer_is_refused_in_a_sentence(
    their_module, source, error, said
):
    with pytest.raises(error, match=said) as caught:
        load_tokenizer(source.format(their_module))
    assert "\n" not in str(caught.value)


def test_an_installed_tokenizer_whose_module_is_broken_is_named(tmp_path, monkeypatch):
    install(tmp_path / "site", "their-broken", "broken", "their_broken_module:Theirs")
    (tmp_path / "site" / "their_broken_module.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ConfigError, match=r"installed as their_broken_module:Theirs, which cannot"):
        load_tokenizer("broken")
