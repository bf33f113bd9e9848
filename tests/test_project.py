"""The project's frame: documented commands exist, the tree keeps its rules, nothing is local."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from worldloom.pipelines.commands import COMMANDS
from worldloom.pipelines.settings import parse

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "common": ROOT / "packages/common",
    "tokenizer": ROOT / "packages/tokenizer",
    "dynamics": ROOT / "packages/dynamics",
    "pipelines": ROOT / "pipelines",
}
NOT_OURS = {"runs", "dist", "_vizdoom", "__pycache__"}
TEXT = {".py", ".md", ".toml", ".json", ".html", ".css", ".js", ".txt", ".cfg", ".yml", ""}


def project_files() -> list[Path]:
    """Return every file of the tree but caches, environments and results."""
    files, folders = [], [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            hidden = path.name.startswith(".") and path.name != ".ci"
            if path.is_dir() and not hidden and path.name not in NOT_OURS:
                folders.append(path)
            elif path.is_file() and path.name != ".git":
                files.append(path)
    return files


DOCUMENTS = [path for path in project_files() if path.suffix == ".md"]


def commands_of(text: str) -> list[list[str]]:
    """Return the words of every command in the ```bash blocks of a Markdown text."""
    commands = []
    for block in re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;<>")
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, "&&"]:
                if word[0] in "&|;":
                    commands.append(command)
                    command = []
                else:
                    command.append(word)
    return [command for command in commands if command]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_command(words: list[str]) -> None:
    """Refuse a documented command line that the program itself would refuse."""
    words = words[: words.index(">")] if ">" in words else words
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if program == "make":
        named = [word for word in arguments if not word.startswith("-") and "=" not in word]
        assert set(named) <= make_targets(), words
    elif program == "worldloom" and arguments[:1] not in (["--help"], ["--version"], []):
        assert arguments[0] in COMMANDS, words
        cls, _ = COMMANDS[arguments[0]].load()
        if "--help" not in arguments:
            parse(cls, arguments[1:], command=arguments[0])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_document_is_one_the_program_accepts(path):
    for words in commands_of(path.read_text("utf-8")):
        check_command(words)


def test_the_check_above_reads_continued_joined_and_commented_lines():
    text = (
        "```bash\n$ make setup  # once\nA=1 && worldloom info \\\n  runs/demo | head\n"
        '.venv/bin/worldloom info "a b" > x\n```\n```python\nmake nothing\n```\n'
    )
    assert commands_of(text) == [
        ["make", "setup"], ["A=1"], ["worldloom", "info", "runs/demo"], ["head"],
        [".venv/bin/worldloom", "info", "a b", ">", "x"],
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["make nothing", "worldloom tokenise", "worldloom info --jsn p"])
def test_the_check_above_refuses_what_does_not_exist(line):
    with pytest.raises(Exception, match=r"nothing|tokenise|--jsn"):
        check_command(line.split())


def test_the_makefile_has_the_targets_that_people_and_ci_call():
    assert {"setup", "demo", "play", "test", "lint", "check", "clean", "help"} <= make_targets()
    script = (ROOT / ".ci/run").read_text()
    called = set(re.findall(r"make ([a-z]+)", script))
    assert {"setup", "lint", "test"} == called
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_no_file_names_a_place_on_somebodys_machine():
    # Split, so that this line is not what it looks for.
    places = re.compile("/(?:ho" r"me|Users|ro" r"ot|wo" r"rk)/\w|[A-Z]:\\\\?Users")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in project_files()
        if path.suffix in TEXT
        for match in places.finditer(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_is_typed_described_and_part_of_one_namespace(name):
    folder = PACKAGES[name]
    source = folder / "src" / "worldloom"
    assert (source / name / "py.typed").is_file()
    assert not (source / "__init__.py").exists()  # or it would hide the other three
    home = ROOT if name == "pipelines" else folder
    assert (home / "README.md").is_file()
    assert (home / "pyproject.toml").is_file()


def test_the_four_distributions_share_one_version_and_one_license():
    projects = [
        tomllib.loads((path if path != PACKAGES["pipelines"] else ROOT).joinpath(
            "pyproject.toml").read_text())["project"]
        for path in PACKAGES.values()
    ]  # fmt: skip
    assert len({project["version"] for project in projects}) == 1
    assert {project["license"] for project in projects} == {"MIT"}
    assert "MIT License" in (ROOT / "LICENSE").read_text()


def test_no_file_is_called_utils():
    assert [path for path in project_files() if path.stem in ("utils", "helpers", "misc")] == []


def test_the_halves_import_only_what_they_may():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
