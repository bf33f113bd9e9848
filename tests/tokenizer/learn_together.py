"""Toy trainings of every quantizer, in one process or under torchrun; every process saves its own.

python learn_together.py EPISODES FOLDER     writes FOLDER/KIND-RANK.safetensors
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tokenizer.toys import CONFIG, EVERYTHING, TRAINING
from worldloom.common import Episodes
from worldloom.tokenizer import Clips, ConvTokenizer, QuantizerConfig, Trained
from worldloom.tokenizer.learner import Learner

QUANTIZERS = {
    "fsq": QuantizerConfig(kind="fsq", fsq_levels=(4, 4, 2)),
    "lfq": QuantizerConfig(kind="lfq", vocab_size=32),
    # Codes die at every update, so that replacing them is part of what must agree.
    "vq": QuantizerConfig(vocab_size=32, code_dim=4, dead_code_threshold=1.0),
    "residual": QuantizerConfig(kind="residual", vocab_size=16, code_dim=4, num_levels=2),
}
"""fsq learns no codebook; the clips of a batch of 5 are not dealt out evenly."""
NUM_STEPS = 6
OPTIMIZERS = {"fsq": "adamw"}
"""muon, the others', rounds its matrices to bfloat16: what differs in the last bit then differs in
the third digit. To compare sums, fsq takes the one that rounds to float32."""


def learn(kind: str, episodes: Episodes, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Train with everything switched on; return every tensor, and the losses."""
    config = replace(CONFIG, quantizer=QUANTIZERS[kind])
    training = replace(
        TRAINING,
        **EVERYTHING,
        batch_clips=5,
        num_steps=NUM_STEPS,
        optimizer=OPTIMIZERS.get(kind, "muon"),
    )
    clips = Clips(episodes, episodes.split("train"), clip_frames=4, size=(16, 24), resize="exact")
    tokenizer = ConvTokenizer(
        config, trained=Trained(fps=1, frame_skip=1), seed=3, tokens_per_step=5 * 4 * 24 // 2
    )
    learner = Learner(tokenizer, None, training=training, accelerator=accelerator)
    losses = []
    for step in range(NUM_STEPS):
        frames = clips.batch(
            step, size=5, seed=0, rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        )  # fmt: skip
        update = learner.gradients(frames, step=step)
        numbers = update.numbers(accelerator)
        losses.append([numbers["loss"], numbers["psnr_db"], numbers["gradient_norm"]])
        learner.apply(step=step)
    tensors = {
        f"{group}/{name}": tensor.detach().clone()
        for group, named in learner.tensors().items()
        for name, tensor in named.items()
    }
    return {**tensors, "losses": torch.tensor(losses)}


def main(episodes: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for kind in QUANTIZERS:
        tensors = learn(kind, Episodes(episodes), accelerator)
        save_file(tensors, folder / f"{kind}-{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
