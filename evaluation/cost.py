"""What a model costs, measured on meta tensors: nothing is computed.

Letters: N images at a level, L patches an image, D width.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models.fractalgen import FractalGen
from models.generator import Generator, Mask
from models.noise import COUNT, Noise
from models.pixelloss import PixelLoss
from models.sampling.canvas import LevelSampler
from models.sampling.guidance import Guidance
from models.sampling.prepare import Setup


def flops_of(call: Callable[[], object]) -> int:
    """Floating-point operations (2 a multiply-add) of what `call` does, by torch's counter: matrix products alone count."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def on_meta(model: FractalGen) -> FractalGen:
    return model if model.fake_latent.is_meta else copy.deepcopy(model).to("meta")


def rgb_head(model: FractalGen) -> PixelLoss:
    return model.next_fractal if isinstance(model.next_fractal, PixelLoss) else rgb_head(model.next_fractal)


def level_names(model: FractalGen) -> list[str]:
    return [*(f"level{i}" for i in range(len(model.generators))), "rgb"]


@dataclass(frozen=True)
class ForwardCost:
    """Of an image's patch tokens. flops: operations by level, the RGB head last; entries: of the attention matrices of one
    head and block, by level above the pixel, from the operations of the products with them (two multiply-adds a channel)."""

    flops: list[int]
    entries: list[int]


def forward_cost(model: FractalGen) -> ForwardCost:
    """One forward pass in the paper's convention (Table 1): batch 1, every patch of every level, transformer blocks without
    condition tokens, and at the RGB head the condition's projection; neither embeddings nor logits."""
    model, cost, images = on_meta(model), ForwardCost([], []), 1
    for spec, generator in ((generator.spec, generator) for generator in model.generators):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            generator.run(torch.empty(images, spec.num_patches, spec.embed_dim))
        by_operator = {
            str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()
        }
        attention = sum(flops for name, flops in by_operator.items() if "bmm" in name or "attention" in name)
        cost.flops.append(counter.get_total_flops())
        cost.entries.append(attention // (4 * spec.embed_dim * spec.num_blocks))
        images *= spec.num_patches
    head = rgb_head(model)
    cond = torch.empty(images, head.cond_proj.in_features, device="meta")
    tokens = torch.empty(images, 3, head.cond_proj.out_features, device="meta")
    cost.flops.append(flops_of(lambda: (head.cond_proj(cond), head.run(tokens))))
    return cost


def patches_in_training(generator: Generator) -> int:
    """How many patches of an image a level hands down in training, on average, rounded; all where it draws no mask."""
    spec, n = generator.spec, 64
    noise = Noise.of_images(0, range(n), (spec.img_size, spec.patch_size))
    noise.maps[0][:, COUNT] = ((torch.arange(n) + 0.5) / n).view(n, 1, 1, 1)
    mask = generator.draw_mask(noise, train=True)
    return spec.num_patches if mask is None else round(len(mask.rows) / n)


def training_flops(model: FractalGen) -> list[int]:
    """Operations of what one image's forward pass in training really runs, by level, the RGB head last: condition tokens,
    guiding heads, embeddings and logits in it, of the patches that are masked, as many as on average."""
    model, masks, images = on_meta(model), [], 1
    for generator in model.generators:
        length, going = generator.spec.num_patches, patches_in_training(generator)
        masked = torch.ones(images, length, dtype=torch.bool, device="meta")
        masks.append(Mask(masked, torch.empty(images * going, dtype=torch.long, device="meta")))
        images *= going
    size = model.img_size_list[0]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.long), masks=masks)
    below = [type(model).__name__ + ".next_fractal" * level for level in range(len(masks) + 1)]
    names = [*(f"{name}.generator" for name in below[:-1]), below[-1]]
    return [sum(counter.get_flop_counts()[name].values()) for name in names]


@dataclass(frozen=True)
class SamplingCost:
    """Of one image. flops: operations by level, the RGB head last, a guiding head's among its level's. calls: how often each
    network is called, "level0", "guiding1", …, "rgb": once for all images of a step, so as often for a batch as for one; a
    head's three channels are one call."""

    flops: list[int]
    calls: dict[str, int]


def sampling_cost(
    model: FractalGen, num_iter_list: Sequence[int], guided: bool, refresh: int = 1
) -> SamplingCost:
    """What the sampler runs for one image in so many steps of each level, with classifier-free guidance or without; for
    `refresh` see `Setup`.

    Measured with one block and with two at every level: each further one costs as much as the second.
    """
    shallow = []
    for depth in (1, 2):
        blocks = [min(depth, own) for own in model.arguments["num_blocks_list"]]
        with torch.device("meta"):
            shallow.append(FractalGen(**{**model.arguments, "num_blocks_list": blocks}))
    one, two = (_sampling_cost(cut, num_iter_list, guided, refresh) for cut in shallow)
    extra = [own - 1 for own in model.arguments["num_blocks_list"]]
    flops = [f1 + n * (f2 - f1) for n, f1, f2 in zip(extra, one.flops, two.flops, strict=True)]
    return SamplingCost(flops, one.calls)


def _sampling_cost(
    model: FractalGen, num_iter_list: Sequence[int], guided: bool, refresh: int
) -> SamplingCost:
    guidance = Guidance.create(
        2.0 if guided else 1.0, "constant", 1.0, 0.0, pick=lambda probs, uniforms: uniforms.long()
    )
    with torch.device("meta"), torch.no_grad():
        sampler = model.sampler(Setup(model.generator.dtype, refresh=refresh))
    cost, images, calls = SamplingCost([], {}), 1, 1
    for level, num_iter in enumerate(num_iter_list):
        noise = Noise.of_images(0, [0], model.img_size_list[level:], device="meta")
        one, steps = _level_flops(sampler, num_iter, guidance, noise)
        if sampler.generator.spec.guiding_pixel:
            cost.calls[f"guiding{level}"] = calls
        calls *= steps
        cost.flops.append(images * one)
        cost.calls[f"level{level}"] = calls
        images *= sampler.generator.spec.num_patches
        sampler = sampler.child
    conds = [torch.empty(2 if guided else 1, rgb_head(model).cond_proj.in_features, device="meta")]
    noise = Noise([torch.empty(1, 5, 1, 1, device="meta")])
    cost.flops.append(images * flops_of(lambda: sampler.draw(conds, guidance, noise)))
    cost.calls["rgb"] = calls
    return cost


def _level_flops(sampler: LevelSampler, num_iter: int, guidance: Guidance, noise: Noise) -> tuple[int, int]:
    """Operations of one image of a level, without what is below it, and its number of steps.

    Of the steps that decide as many patches after as many, the first and the last are measured: what such a step costs grows
    evenly with its place (an AR level's attention: one patch each), or not at all. With `refresh` all are measured.
    """
    generator = sampler.generator
    spec, rows = generator.spec, 2 if guidance.doubled else 1
    conds = [torch.empty(rows, spec.cond_dim, device="meta")] * sampler.reads
    start = lambda: sampler.start(conds, guidance, noise, generator.order(noise))  # noqa: E731
    with torch.device("meta"), torch.no_grad():
        state = start()
    spans = [(begin, end) for begin, end, _ in generator.plan(num_iter)]
    before = [0, *(end - begin for begin, end in spans)]

    def step_flops(number: int) -> int:
        known = torch.empty(1, before[number], spec.patch_dim, device="meta") if number else None
        return flops_of(lambda: sampler.predict(state, known, *spans[number]))

    total, alike = flops_of(start), defaultdict(list)
    if sampler.setup.refresh > 1 and spec.index == 0:
        return total + sum(map(step_flops, range(len(spans)))), len(spans)
    for number, (begin, end) in enumerate(spans):
        alike[before[number], end - begin].append(number)
    for numbers in alike.values():
        ends = {numbers[0], numbers[-1]}
        total += sum(map(step_flops, ends)) * len(numbers) // len(ends)
    return total, len(spans)


def training_bytes(model: FractalGen, batch_size: int) -> dict[str, int]:
    """Memory of a training step in bytes, in float32: weights with gradients and AdamW's two moments, and the tensors
    that the forward pass of `batch_size` images keeps for the backward pass when every patch goes down (the most)."""
    model = copy.deepcopy(model).to("meta").train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    masks, images = [], 1  # activations grow with the batch: measured for one image
    with torch.device("meta"):
        for generator in model.generators:
            length = generator.spec.num_patches
            masks.append(Mask(torch.ones(images, length, dtype=torch.bool), torch.arange(images * length)))
            images *= length
        size = model.img_size_list[0]
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.long), masks=masks)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    activations = sum(size for key, size in kept.items() if key not in own)
    return {"weights, gradients, moments": 4 * weights, "activations": activations * batch_size}


def parameters_by_level(model: FractalGen) -> list[int]:
    """The class embeddings belong to level 0, guiding heads to their level."""
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    levels = [*map(count, model.generators), count(rgb_head(model))]
    return [levels[0] + count(model) - sum(levels), *levels[1:]]


def cost_report(
    model: FractalGen,
    batch_size: int,
    num_iter_list: Sequence[int] | None = None,
    guided: bool = False,
    refresh: int = 1,
) -> dict:
    """What `--dry_run` prints of a model: everything above, in GFLOPs and GiB, and by level.

    `num_iter_list` (default: the model's), `guided` and `refresh` are for the cost of sampling. The line on attention is
    the paper's argument in numbers: all pixels in one sequence against the short ones of each level.
    """
    steps, side = tuple(num_iter_list or model.sampling_defaults.num_inference_steps), model.img_size_list[0]
    names, forward, sampling = (
        level_names(model),
        forward_cost(model),
        sampling_cost(model, steps, guided, refresh),
    )
    with torch.device("meta"):
        flat = FractalGen((side, 1), (4, 4), (1, 1), (1, 1), ("mar", "ar"))
    by_level = lambda numbers: dict(zip(names, numbers, strict=True))  # noqa: E731
    gflops = lambda counts: {
        k: round(v / 1e9, 3) for k, v in {**by_level(counts), "total": sum(counts)}.items()
    }
    attention = dict(zip(names, forward.entries, strict=False))  # the RGB head has three tokens
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_by_level": by_level(parameters_by_level(model)),
        "forward_gflops_per_image": gflops(forward.flops),
        "training_forward_gflops_per_image": gflops(training_flops(model)),
        "attention_matrix_entries": {
            f"one sequence of {side}x{side} pixels": forward_cost(flat).entries[0],
            **attention,
        },
        "sampling": {
            "num_iter_list": steps,
            "guidance": guided,
            "refresh": refresh,
            "gflops_per_image": gflops(sampling.flops),
            "network_calls": sampling.calls,
        },
        "training_gib_at_most_in_float32": {
            name: round(size / 2**30, 3) for name, size in training_bytes(model, batch_size).items()
        },
    }
