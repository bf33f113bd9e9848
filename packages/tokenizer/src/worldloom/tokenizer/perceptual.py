"""LPIPS, the distance that a network sees, for a person who already has its weights.

    true and other frames_THWC  ->  lpips_distance  ->  distance_T, 0 where they are equal

It needs the package `lpips` (the extra `worldloom-tokenizer[lpips]`) and AlexNet's weights in
torch hub's cache, where torchvision puts them. Nothing is ever downloaded: whatever is missing is
said in a sentence that stands beside the missing number.

Source: Zhang et al., arXiv:1801.03924, version 0.1 with AlexNet.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from worldloom.common import ShapeError

from .metrics import require_alike
from .pixels import to_video

LPIPS_LEAST_SIZE = 31
"""Pixels: of smaller frames AlexNet's strides leave nothing."""


def load_lpips(*, device: str) -> nn.Module | str:
    """Return the network, or the reason why there is none: "not measured: ..."."""
    if find_spec("lpips") is None:
        return (
            "not measured: the package lpips is not installed; "
            "pip install 'worldloom-tokenizer[lpips]'"
        )
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        return f"not measured: {path} is missing, the weights of AlexNet; download them from {url}"
    try:
        # It finds the file and does not download. weights_only: the file may be anyone's.
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        network = _network(state)
    except Exception as error:
        # A package and a file that are not ours may fail in any way; one number is worth no crash.
        return f"not measured: LPIPS cannot be built with {path} ({type(error).__name__})"
    return network.to(device)


def lpips_distance(network: nn.Module, true_THWC: Tensor, other_THWC: Tensor, /) -> Tensor:
    """Return distance_T, float32 on the CPU, at least 0.

    Args:
        network: of `load_lpips`.
        true_THWC: uint8.
        other_THWC: uint8, of the same shape.

    Raises:
        ShapeError: if the two are not uint8 of one shape, at least LPIPS_LEAST_SIZE each way.
    """
    require_alike(true_THWC, other_THWC)
    if min(true_THWC.shape[1:3]) < LPIPS_LEAST_SIZE:
        raise ShapeError(
            f"frames: {true_THWC.shape[1]} x {true_THWC.shape[2]} pixels; LPIPS needs at least "
            f"{LPIPS_LEAST_SIZE} x {LPIPS_LEAST_SIZE}"
        )
    device = next(network.parameters()).device
    videos = [to_video(frames[None].to(device)) for frames in (true_THWC, other_THWC)]
    with torch.inference_mode():
        distance_T111: Tensor = network(*(rearrange(v, "1 C T H W -> T C H W") for v in videos))
    return rearrange(distance_T111, "T 1 1 1 -> T").cpu()


def _network(state: dict[str, Tensor]) -> nn.Module:
    """Return LPIPS around AlexNet with these weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the way it was called in 2021
        # Its linear layers come along with the package; the network below them does not, and by
        # itself it would download it, and unpickle whatever lies in the cache.
        network: nn.Module = import_module("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = network.get_submodule("net")
    # It cuts AlexNet's features into slices and keeps their numbers: slice2.3 is features.3.
    ours = {key: state[f"features.{key.partition('.')[2]}"] for key in trunk.state_dict()}
    trunk.load_state_dict(ours)
    return network.eval().requires_grad_(requires_grad=False)
