"""What a model costs: the report of `--dry_run`, measured on meta tensors."""

from collections.abc import Sequence

import torch
from torch.autograd.graph import saved_tensors_hooks

from evaluation.cost import forward_cost, masked_forward, sampling_cost, training_flops
from models.fractalgen import FractalGen
from models.likelihood.inside import softmax_heads
from models.sampling.options import SamplingOptions


def training_bytes(model: FractalGen, batch_size: int) -> dict[str, int]:
    """Memory of a training step in bytes, in float32, of a model on the meta device in training mode.

    It consists of the weights with their gradients and AdamW's two moments, and of the tensors that the
    forward pass of `batch_size` images keeps for the backward pass when every patch is passed down, which is
    the most.
    """
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    # Activations grow with the batch: they are measured for one image.
    forward = masked_forward(model, [generator.spec.num_patches for generator in model.generators])
    with torch.device("meta"), saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    activations = sum(size for key, size in kept.items() if key not in own)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights, gradients, moments": 4 * weights, "activations": activations * batch_size}


def parameters_by_level(model: FractalGen) -> list[int]:
    """The class embeddings belong to level 0, guiding heads to their level; the RGB head comes last."""
    *_, head = softmax_heads(model)
    first, *others = (
        sum(p.numel() for p in part.parameters()) for part in (model, *model.generators[1:], head)
    )
    return [first - sum(others), *others]


def cost_report(model: FractalGen, batch_size: int, options: SamplingOptions) -> dict:
    """What `--dry_run` prints of a model on the meta device: everything above, in GFLOPs and GiB, by level.

    The entries of attention matrices are the paper's argument in numbers: all pixels in one sequence, against
    the short sequences of each level.
    """
    names, side = [*(f"level{i}" for i in range(len(model.generators))), "rgb"], model.img_size_list[0]
    (forward, entries), (sampling, calls) = forward_cost(model), sampling_cost(model, options)
    with torch.device("meta"):
        flat = FractalGen((side, 1), (4, 4), (1, 1), (1, 1), ("mar", "ar"))

    def gflops(counts: Sequence[int]) -> dict[str, float]:
        by_name = {**dict(zip(names, counts, strict=True)), "total": sum(counts)}
        return {name: round(count / 1e9, 3) for name, count in by_name.items()}

    memory = training_bytes(model, batch_size)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_by_level": dict(zip(names, parameters_by_level(model), strict=True)),
        "forward_gflops_per_image": gflops(forward),
        "training_forward_gflops_per_image": gflops(training_flops(model)),
        "attention_matrix_entries": {
            f"one sequence of {side}x{side} pixels": forward_cost(flat)[1][0],
            **dict(zip(names, entries, strict=False)),  # the RGB head has three tokens
        },
        "sampling": {
            "num_iter_list": options.num_inference_steps,
            "guidance": options.guidance_scale != 1,
            "feature_cache_interval": options.feature_cache_interval,
            "gflops_per_image": gflops(sampling),
            "network_calls": calls,
        },
        "training_gib_at_most_in_float32": {name: round(size / 2**30, 3) for name, size in memory.items()},
    }
