"""The README's commands, run for real and in order, made small by further flags alone."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from video_worlds import played, write_actions, write_video

ROOT = Path(__file__).parents[1]
pytest.importorskip("vizdoom")

# What a stranger would wait minutes for; the flags of the README stay where they are, before these.
SMALLER = {
    "record": "--num-episodes 6 --max-frames 24 --height 32 --width 32",
    "train-tokenizer": (
        "--model.height 32 --model.width 32 --model.widths 8 16 --model.num-blocks 1 1 "
        "--model.quantizer.vocab-size 32 --training.num-steps 4 --training.batch-clips 2 "
        "--training.no-bf16"
    ),
    "tokenize": "",
    "ingest": "",
    "info": "",
    "shards": "",
    "train-dynamics": (
        "--model.num-layers 1 --model.dim 32 --model.num-heads 2 --training.num-steps 4 "
        "--training.batch-windows 2 --training.no-bf16"
    ),
    "generate": "--device cpu",
    "play": "--device cpu --port 0",
    "evaluate": "--device cpu",
}
ORDER = ["record", "train-tokenizer", "tokenize", "train-dynamics", "generate", "play",
         "ingest", "info", "record", "tokenize", "shards", "train-dynamics",
         "train-tokenizer", "evaluate"]  # fmt: skip
LAST = {"info", "evaluate"}  # after these there is nothing to go on with


def readme_commands() -> list[list[str]]:
    """Return the words of every `worldloom` command in the README's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("worldloom ")]


def without(words: list[str], flags: list[str]) -> list[str]:
    """Return a command line without flags that are given again, and without their values."""
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word in flags
        if not skipping:
            kept.append(word)
    return kept


def open_the_page(line: list[str], folder: Path) -> None:
    """Do what the reader does: start it, open the address that it prints, end it with Ctrl-C."""
    command = [sys.executable, "-m", "worldloom.pipelines", *line]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as playing:
        said = ""
        try:
            for row in playing.stderr:
                said += row
                if found := re.search(r"open (http://\S+)", row):
                    with urlopen(found[1], timeout=30) as page:
                        assert b"<canvas" in page.read()
                    playing.send_signal(signal.SIGINT)
            assert playing.wait(30) == 130, said
        finally:
            playing.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # more than a dozen commands, and others may be busy with the machine
def test_the_commands_of_the_readme_lead_from_a_game_to_a_video(tmp_path):
    commands = readme_commands()
    assert [words[1] for words in commands] == ORDER
    for name in ("a", "b"):  # what the reader of the README has already
        world = played("discrete", 20)
        write_video(tmp_path / f"recordings/{name}.mp4", world.frames_THWC)
        write_actions(tmp_path / f"recordings/{name}.csv", world)
    for words in commands:
        smaller = SMALLER[words[1]].split()
        line = [*without(words[1:], smaller), *smaller]
        if words[1] == "play":
            open_the_page(line, tmp_path)
            continue
        ran = subprocess.run(
            [sys.executable, "-m", "worldloom.pipelines", *line],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{line}\n{ran.stderr}"
        assert words[1] in LAST or "next: worldloom " in ran.stderr
    made = tmp_path / "runs/doom/generated"
    assert {path.name for path in made.iterdir()} >= {
        "generated.mp4", "generated.gif", "contact-sheet.png",
    }  # fmt: skip
    assert (tmp_path / "runs/doom/tokenizer-evaluation/reconstructions.png").is_file()
    assert (tmp_path / "runs/mine/preview.png").is_file()
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", "".join(blocks)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(blocks) == 1
    # Games leave no litter behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recordings", "runs"]
