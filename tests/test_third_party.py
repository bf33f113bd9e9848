"""docs/tokenizers.md: its tokenizer, a distribution of its own, goes through the whole chain."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chain_worlds import DYNAMICS_FLAGS, hashes, write_pushed_squares
from command_server import CommandServer
from worldloom.common import TokenShards
from worldloom.tokenizer.patch import PatchTokenizer

DOCUMENT = (Path(__file__).parents[1] / "docs/tokenizers.md").read_text()
LENGTHS = (8, 5, 9, 6)
pytestmark = pytest.mark.slow


def file_of_the_document(name: str) -> str:
    """The block of code that follows a line with the file's name."""
    (text,) = re.findall(rf"^`{re.escape(name)}`:\n\n```\w+\n(.*?)^```", DOCUMENT, re.S | re.M)
    return text


@dataclass(frozen=True)
class ThirdParty:
    """A tokenizer of somebody else's, and what the commands made with it."""

    site: Path
    commands: CommandServer
    folder: Path

    def run(self, *words: object) -> str:
        """Run a command that must succeed; return what it said."""
        ended = self.commands.run(*words)
        assert ended.code == 0, ended.err
        return ended.err


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The document's two files, installed beside this environment and not into it."""
    source = tmp_path_factory.mktemp("greycells")
    for name in ("pyproject.toml", "greycells.py"):
        (source / name).write_text(file_of_the_document(name))
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-index", "--no-deps", "--no-build-isolation", "--target", target, source],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return target


@pytest.fixture(scope="module")
def with_site(site) -> Iterator[dict[str, str]]:
    """An environment whose Python finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
        yield dict(os.environ)


@pytest.fixture(scope="module")
def theirs(site, with_site, tmp_path_factory) -> Iterator[ThirdParty]:
    """Shards and a model made with it, by the commands of the document."""
    folder = tmp_path_factory.mktemp("theirs")
    episodes = write_pushed_squares(folder / "episodes", LENGTHS)
    with CommandServer() as commands:
        party = ThirdParty(site, commands, folder)
        party.run("tokenize", "--episodes", episodes, "--tokenizer", "grey", "--device", "cpu",
                  "--output", folder / "shards")  # fmt: skip
        party.run("train-dynamics", "--shards", folder / "shards", "--output", folder / "dynamics",
                  *DYNAMICS_FLAGS, "--training.num-steps", 2)  # fmt: skip
        yield party


def generate(theirs: ThirdParty, tokenizer: str, output: Path) -> tuple[object, ...]:
    return ("generate", "--model", theirs.folder / "dynamics/model", "--tokenizer", tokenizer,
            "--start", theirs.folder / "shards", "--prompt-frames", 2, "--actions", "LEFT*3",
            "--seed", 4, "--device", "cpu", "--output", output)  # fmt: skip


def test_the_tokenizer_of_the_document_keeps_every_promise(with_site):
    done = subprocess.run(
        [sys.executable, "-m", "worldloom.tokenizer.testing", "grey"],
        env=with_site, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}


def test_it_is_about_forty_lines_and_leaves_nothing_out():
    lines = file_of_the_document("greycells.py").splitlines()
    assert len([line for line in lines if line.strip() and "import" not in line]) <= 50


def test_its_shards_say_who_wrote_them_and_carry_its_codebook(theirs):
    shards = TokenShards(theirs.folder / "shards")
    assert (shards.tokenizer.name, shards.codes.vocab_size, shards.codes.cells) == ("grey", 64, 64)
    assert shards.codebook_VZ().shape == (64, 1)
    manifest = json.loads((theirs.folder / "shards/manifest.json").read_text())
    assert manifest["metrics"]["psnr_db"] > 10


def test_a_video_comes_out_whose_codes_are_the_same_for_every_way_to_name_it(theirs, tmp_path):
    made = []
    for name in ("grey", "greycells:GreyCells"):
        output = tmp_path / name
        theirs.run(*generate(theirs, name, output))
        made.append(hashes(output))
    assert {"generated.gif", "generated.mp4", "codes.npz", "session.json"} <= set(made[0])
    assert made[0] == made[1]


def test_tokenizing_names_it_in_the_next_command_and_the_plan_its_fingerprint(theirs, tmp_path):
    name = "greycells:GreyCells"
    said = theirs.run("tokenize", "--episodes", theirs.folder / "episodes", "--tokenizer", name,
                      "--device", "cpu", "--output", tmp_path / "shards")  # fmt: skip
    assert f"--tokenizer {name}" in said.splitlines()[-1]
    plan = json.loads((tmp_path / "shards/plan.json").read_text())
    assert plan["tokenizer"] == TokenShards(theirs.folder / "shards").tokenizer.fingerprint
    assert hashes(tmp_path / "shards") == hashes(theirs.folder / "shards")


def test_generating_with_another_tokenizer_is_refused_with_the_fields_that_differ(theirs, tmp_path):
    ended = theirs.commands.run(*generate(theirs, "patch", tmp_path / "out"))
    assert ended.code == 3
    spec = TokenShards(theirs.folder / "shards").tokenizer
    assert spec.fingerprint[:16] in ended.err
    assert PatchTokenizer().spec.fingerprint[:16] in ended.err
    for field in ("name ('grey' against 'patch')", "codes.vocab_size (64 against 252)",
                  "codes.code_dim (1 against 3)", "fingerprint ("):  # fmt: skip
        assert field in ended.err
    assert "height" not in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_same_training_command_learns_from_shards_of_the_baseline(theirs, tmp_path):
    theirs.run("tokenize", "--episodes", theirs.folder / "episodes", "--tokenizer", "patch",
               "--device", "cpu", "--output", tmp_path / "shards")  # fmt: skip
    theirs.run("train-dynamics", "--shards", tmp_path / "shards", "--output", tmp_path / "dynamics",
               *DYNAMICS_FLAGS, "--training.num-steps", 2)  # fmt: skip
    assert (tmp_path / "dynamics/model/model.safetensors").exists()
