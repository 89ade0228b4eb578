"""What a model costs, measured on meta tensors: nothing is computed.

Letters: N pictures at a level, L patches a picture, D width.
"""

import copy

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models.fractalgen import FractalGen
from models.generator import Mask
from models.pixelloss import PixelLoss


def forward_flops(model: FractalGen) -> list[int]:
    """Floating-point operations (2 a multiply-add) of one forward pass by level, the RGB head last.

    The paper's convention (Table 1): batch 1, every patch of every level, transformer blocks without condition tokens,
    and at the RGB head the condition's projection; neither embeddings nor logits.
    """
    model, counts, pictures = copy.deepcopy(model).to("meta"), [], 1
    with torch.device("meta"), torch.no_grad():
        for generator in model.generators:
            spec = generator.spec
            with FlopCounterMode(display=False) as counter:
                generator.run(torch.empty(pictures, spec.num_patches, spec.embed_dim))
            counts.append(counter.get_total_flops())
            pictures *= spec.num_patches
        head = next(module for module in reversed(list(model.modules())) if isinstance(module, PixelLoss))
        with FlopCounterMode(display=False) as counter:
            head.cond_proj(torch.empty(pictures, head.cond_proj.in_features))
            head.run(torch.empty(pictures, 3, head.cond_proj.out_features))
        counts.append(counter.get_total_flops())
    return counts


def training_bytes(model: FractalGen, batch_size: int) -> dict[str, int]:
    """Memory of a training step in bytes, in float32: weights with gradients and AdamW's two moments, and the tensors
    that the forward pass of `batch_size` pictures keeps for the backward pass when every patch goes down (the most)."""
    model = copy.deepcopy(model).to("meta").train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    masks, pictures = [], 1  # activations grow with the batch: measured for one picture
    with torch.device("meta"):
        for generator in model.generators:
            length = generator.spec.num_patches
            masks.append(Mask(torch.ones(pictures, length, dtype=torch.bool), torch.arange(pictures * length)))
            pictures *= length
        size = model.img_size_list[0]
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.long), masks=masks)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    activations = sum(size for key, size in kept.items() if key not in own)
    return {"weights, gradients, moments": 4 * weights, "activations": activations * batch_size}


def cost_report(model: FractalGen, batch_size: int) -> dict:
    """Parameters, forward GFLOPs of a picture by level (as `forward_flops`), training memory in GiB (as `training_bytes`)."""
    flops = forward_flops(model)
    names = [*(f"level{i}" for i in range(len(flops) - 1)), "rgb"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_gflops_per_picture": {name: round(f / 1e9, 3) for name, f in zip(names, flops, strict=True)},
        "training_gib_at_most_in_float32": {
            name: round(size / 2**30, 3) for name, size in training_bytes(model, batch_size).items()
        },
    }
