"""One of two processes that train quantizers together, for tests/tokenizer/test_quantizers.py.

python process_of_two.py FOLDER RANK     writes FOLDER/RANK.safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from worldloom.common import library_seed
from worldloom.tokenizer import QuantizerConfig
from worldloom.tokenizer.quantizers import build_quantizer

CONFIGS = {
    # Every code is dead in most steps, so that replacing them is part of what must agree.
    f"{kind} {cosine}": QuantizerConfig(
        kind=kind, vocab_size=64, code_dim=6, cosine=cosine, dead_code_threshold=1.0
    )
    for kind in ("vq", "residual")
    for cosine in (False, True)
}
LFQ = QuantizerConfig(kind="lfq", vocab_size=64)


def half_batch(rank: int, step: int = 0) -> torch.Tensor:
    """Latents that the two processes do not share, and of another mean each."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randn((1, 200, 6), generator=generator) + rank


def main(folder: Path, rank: int) -> None:
    """Train, and write the codebooks and the gradients of the entropy loss."""
    torch.set_num_threads(1)
    # Built before there is a group: what this one finds must not be kept for later ones.
    build_quantizer(CONFIGS["vq False"], tokens_per_step=400)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    found = {}
    for name, config in CONFIGS.items():
        with library_seed(0):
            quantizer = build_quantizer(config, tokens_per_step=400)
        for step in range(12):
            with library_seed(step, rank):  # the worst case: they draw differently
                quantizer(half_batch(rank, step).requires_grad_())
        found[name] = quantizer.codebook.clone()
    latents_BNZ = half_batch(rank).requires_grad_()
    loss = build_quantizer(LFQ, tokens_per_step=400).entropy_loss(latents_BNZ)
    loss.backward()
    found |= {"entropy": loss.detach()[None], "gradient": latents_BNZ.grad}
    save_file(found, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
