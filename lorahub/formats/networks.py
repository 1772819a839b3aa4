"""Files that lie where adapters lie and are networks of their own, told by names that only they have.

They stand beside a diffusion model and change none of its weights, so that no merge can hold them.  A table; knows
neither formats nor tensors.

Facts: lllyasviel's ControlNet and diffusers' ``ControlNetModel``, tencent-ailab's IP-Adapter, and sd-scripts'
``control_net_lllite``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NETWORKS", "Network", "network_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One sort of network.

    Attributes:
        title: what people call it, with its article.
        what: it is, as the end of "which is ...".
        use: how it is used.
        begins: how a tensor's name begins in every such file; any of these.
    """

    title: str
    what: str
    use: str
    begins: tuple[str, ...]


NETWORKS: tuple[Network, ...] = (
    Network(
        title="a ControlNet",
        what="a second network beside the UNet, which reads the picture that controls",
        use="diffusers.ControlNetModel.from_single_file(FILE); ComfyUI: Load ControlNet Model",
        begins=("zero_convs.", "control_model.zero_convs.", "controlnet_cond_embedding."),
    ),
    Network(
        title="a ControlNet-LLLite",
        what="small networks that read the picture that controls and change what attention layers are given",
        use="sd-scripts' sdxl_gen_img.py --control_net_lllite_models FILE",
        begins=("lllite_",),
    ),
    Network(
        title="an IP-Adapter",
        what="further attention layers for the features of a picture, and their projection",
        use="diffusers: pipe.load_ip_adapter(...)",
        begins=("ip_adapter.", "image_proj."),
    ),
)
"""What such files are; the first that fits."""


def network_of(keys: Iterable[str]) -> Network | None:
    """The network that a file with tensors of these names holds; None where none is told."""
    names = tuple(keys)
    return next((each for each in NETWORKS if any(name.startswith(each.begins) for name in names)), None)
