"""The settings of `worldloom play`. Needs no torch and no server."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg
from worldloom.common import ConfigError
from worldloom.dynamics import SamplingConfig

from .protocol import MAX_PACE, MIN_PACE
from .session_log import MAX_THREADS


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayConfig:
    """Walk through a learned world with the keyboard: in the browser, or in this terminal.

        worldloom play runs/demo

    prints an address to open. It works on this machine alone and holds a token, without which
    nobody gets in; for a machine far away an `ssh -L` line is printed, too. Without WORLD it plays
    the one world found here, or lists those there are.

    Every session is kept: `worldloom replay SESSION` makes a video of it.
    """

    world: Annotated[Positional[Path | None], arg(metavar="[WORLD]")] = None
    """Folder of a world, as `worldloom demo` writes it."""
    terminal: bool = False
    """Play here, in colours, without a browser."""
    open: bool = False
    """Open the browser as well."""
    port: int = 7860
    """Where the page is served; 0 takes a port that is free."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own lets others in who have the token."""
    pace: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Frames a second at first; 0 is no limit. If left out, those of the recorded game."""
    seed: int = 0
    """Of all that is drawn. The same seed, start and keys give the same world."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How codes are drawn at first. The page can change all of it."""
    sessions: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder that keeps what is played. If left out, WORLD/sessions."""
    start: Annotated[Path | None, arg(metavar="PATH")] = None
    """Token shards or episodes to start from. If left out, those in WORLD."""
    model: Annotated[Path | None, arg(metavar="PATH")] = None
    """Model directory of a world that is not laid out as `worldloom demo` does it; needs
    --tokenizer and --start, and takes the place of WORLD."""
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None
    """The tokenizer that wrote that model's shards, named as `worldloom tokenize` takes it."""
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one), cpu, cuda, mps."""
    threads: int = 0
    """Threads that compute on a CPU. 0 takes one fewer than there are cores, so that the browser
    has one to itself: small worlds run faster so. With --terminal, as many as torch takes."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        parts = [self.model, self.tokenizer]
        if self.world is not None and any(part is not None for part in parts):
            raise ConfigError(
                f"play: {self.world} already names a model and a tokenizer; leave it out, or "
                "--model and --tokenizer"
            )
        if any(part is not None for part in parts) and None in (*parts, self.start):
            raise ConfigError(
                "play: a world in parts needs all three of --model, --tokenizer and --start"
            )
        if not 0 <= self.threads <= MAX_THREADS:
            raise ConfigError(
                f"--threads {self.threads}: must be in [0, {MAX_THREADS}]; 0 chooses by itself"
            )
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"--port {self.port}: must be in [0, 65535]; 0 takes a free one")
        if self.pace is not None and self.pace != 0 and not MIN_PACE <= self.pace <= MAX_PACE:
            raise ConfigError(
                f"--pace {self.pace}: must be in [{MIN_PACE:g}, {MAX_PACE:g}] frames a second, or "
                "0 for no limit"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"--seed {self.seed}: must be at least 0 and below 2**63")
