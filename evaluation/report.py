"""What a model costs: the report of `--dry_run`, measured on meta tensors."""

import weakref
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation.cost import forward_cost, masked_forward, patches_in_training, sampling_cost, training_flops
from models.fractalgen import FractalGen
from models.likelihood.inside import softmax_heads
from models.pixelloss import last_term
from models.sampling.options import SamplingOptions
from util.pixels import in_words


class LiveBytes(TorchDispatchMode):
    """A context that follows the memory of all tensors made in it: `live` bytes now, and the `peak`."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            given = {id(x) for x in args}  # what an operation in place returns
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor) and id(x) not in given:
                    self.follow(x.untyped_storage())
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def freed(_):
            self.live -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def training_bytes(model: FractalGen, batch_size: int) -> dict[str, int]:
    """Memory of a training step in bytes, in float32, of a model on the meta device in training mode.

    It consists of the weights with their gradients and AdamW's two moments, and of what the forward pass of
    `batch_size` images keeps for the backward pass. Their sum is more than the peak, because gradients come
    as what was kept goes. Of the peak there are two: of a step in which each image has the average number of
    masked patches, and of one in which all patches are masked, which is the most. A step's temporary tensors
    are included; a copy of the weights (`--ema`) and the buckets of several processes are not.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    average = [patches_in_training(generator) for generator in model.generators]
    most = [generator.spec.num_patches for generator in model.generators]
    peaks = {"average peak": average, "largest peak": most}
    found = {name: 3 * weights + _step_bytes(model, batch_size, patches) for name, patches in peaks.items()}
    return {"weights, gradients, moments": 4 * weights, **found}


def _step_bytes(model: FractalGen, batch_size: int, patches: Sequence[int]) -> int:
    """The peak of what a forward and a backward pass allocate, the gradients included."""
    forward = masked_forward(model, patches, batch_size)
    with torch.device("meta"), LiveBytes() as memory:
        forward().backward()
    model.zero_grad()
    return memory.peak


def parameters_by_level(model: FractalGen) -> list[int]:
    """The class embeddings belong to level 0, guiding heads to their level; the head comes last."""
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
    names = [*(f"level{i}" for i in range(len(model.generators))), last_term(model.alphabet.channels)]
    (forward, entries), (sampling, calls) = forward_cost(model), sampling_cost(model, options)
    with torch.device("meta"):
        flat = FractalGen((model.image_shape, 1), (4, 4), (1, 1), (1, 1), ("mar", "ar"))

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
            f"one sequence of {in_words(model.image_shape)}": forward_cost(flat)[1][0],
            **dict(zip(names, entries, strict=False)),  # the head has a token for each channel
        },
        "sampling": {
            "num_iter_list": options.num_inference_steps,
            "guidance": options.guidance_scale != 1,
            "feature_cache_interval": options.feature_cache_interval,
            "gflops_per_image": gflops(sampling),
            "network_calls": calls,
        },
        "training_gib_in_float32": {name: round(size / 2**30, 3) for name, size in memory.items()},
    }
