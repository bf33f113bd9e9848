"""Logits with and without actions -> guided logits. Pure.

    logits_BsV given the actions, logits_BsV given none  ->  logits_BsV

Classifier-free guidance goes from what is expected without actions to what is expected with them,
and on. The difference has a part along the prediction itself, which only makes it surer, and a part
across it, which changes what is expected; adaptive projected guidance keeps a share of the first:

    c, n         logits with actions and without, each less its mean over the codes
    d = c - n    where actions push
    p = (<d, c> / <c, c>) c
    guided = c + (scale - 1) (d - p + parallel_keep_frac p)

for every cell by itself. Logits mean the same with a constant added, and a projection would not:
hence the means. Scale 1 gives c, whatever is kept; keeping all of p is n + scale (c - n).

Source: Ho and Salimans, arXiv:2207.12598; Sadat et al., arXiv:2410.02416, on denoised images.
Departs: logits, whose mean is taken off; neither momentum nor a limit to the length of d.
genie2-pytorch projects over the whole sequence at once.
"""

from torch import Tensor


def guide(
    given_BsV: Tensor, free_BsV: Tensor, /, *, scale: float, parallel_keep_frac: float
) -> Tensor:
    """Return guided logits_BsV, float32, with mean 0 over the codes.

    Args:
        given_BsV: logits under the actions, any float dtype.
        free_BsV: logits of the same cells with no action given.
        scale: 1 gives those under the actions, 0 with all kept those without.
        parallel_keep_frac: how much is kept of the part along given_BsV, in [0, 1].
    """
    given_BsV, free_BsV = (_centred(logits_BsV.float()) for logits_BsV in (given_BsV, free_BsV))
    push_BsV = given_BsV - free_BsV
    if parallel_keep_frac < 1:
        square_Bs1 = given_BsV.square().sum(-1, keepdim=True)
        # Where all codes are alike there is no direction to project on, and nothing to take off.
        share_Bs1 = (push_BsV * given_BsV).sum(-1, keepdim=True) / square_Bs1.clamp_min(1e-12)
        push_BsV = push_BsV - (1 - parallel_keep_frac) * share_Bs1 * given_BsV
    return given_BsV + (scale - 1) * push_BsV


def _centred(logits_BsV: Tensor) -> Tensor:
    """Return logits less their mean over the codes."""
    return logits_BsV - logits_BsV.mean(-1, keepdim=True)
