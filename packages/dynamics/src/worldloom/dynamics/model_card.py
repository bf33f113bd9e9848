"""A trained dynamics model -> the README.md beside it: what it speaks, how good it is.

DynamicsModel, how it was trained, held-out numbers  ->  Markdown
"""

from collections.abc import Mapping

from .model import DynamicsModel
from .training_config import DynamicsTrainingConfig


def model_card(
    dynamics: DynamicsModel, training: DynamicsTrainingConfig, scores: Mapping[str, float], /
) -> str:
    """Return the model card, Markdown.

    Args:
        dynamics: the model as it is kept.
        training: how it was trained.
        scores: held-out numbers, by name.
    """
    spec, config, codes = dynamics.spec, dynamics.config, dynamics.spec.tokenizer.codes
    numbers = "\n".join(f"| held out: {name} | {value:.4f} |" for name, value in scores.items())
    levels = codes.num_levels
    averaged = f", averaged ({training.ema_decay:g})" if training.ema_decay else ""
    each, axis = (f" in each of {levels} levels", f", {levels}") if levels > 1 else ("", "")
    return f"""# A worldloom dynamics model

Given codes and actions, the next frame's codes. It speaks the codes of the tokenizer with
fingerprint `{spec.tokenizer.fingerprint[:16]}` and of no other:
{codes.grid_height}x{codes.grid_width} cells of {codes.vocab_size} codes{each}.

| | |
|---|---|
| actions | {": ".join(filter(None, (spec.actions.kind, ", ".join(spec.actions.names))))} |
| frames per second | {spec.fps:g} |
| sizes | {config.num_layers} layers, width {config.dim}, order {config.order} |
| frames in view | {config.context_frames} |
| updates | {training.num_steps}{averaged}, seed {training.seed} |
| windows | {training.batch_windows} an update, {training.window_frames} latent frames each |
{numbers}

```python
from pathlib import Path
from worldloom.dynamics import DynamicsModel, SamplingConfig, generate_codes

model = DynamicsModel.from_pretrained(Path("this folder"))
# prompt: int64 (B, p, {codes.grid_height}, {codes.grid_width}{axis}) codes, p >= 1
# actions: int64 (B, {codes.frames_per_latent} (t - 1), {spec.actions.num_slots}) slots
codes = generate_codes(model, prompt, actions, seeds=[0], sampling=SamplingConfig())
```
"""
