"""How codes are drawn from a model. Needs no torch."""

from dataclasses import dataclass

from worldloom.common import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn from the model's logits."""

    temperature: float = 0.5
    """Divides the logits; 0 takes the likeliest code."""
    min_p: float = 0.1
    """Drop codes less likely than this share of the likeliest (arXiv:2407.01082); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest codes whose probabilities sum to this (arXiv:1904.09751); 1 keeps all.

    A code must pass both: each looks at the whole distribution after the temperature."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"sampling: temperature is {self.temperature}, must be a number, 0 or more"
            )
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"sampling: min_p is {self.min_p}, must be in [0, 1]")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p is {self.top_p}, must be in (0, 1]")
