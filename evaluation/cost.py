"""Counts operations on meta tensors, so that nothing is computed (paper, 4.1, its table of costs).

Functions take a model on the meta device, unless they say otherwise. Lists of operations are by level, the
head last.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from operator import mul

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from models.fractalgen import FractalGen
from models.generator import Generator, Mask
from models.likelihood.inside import softmax_heads
from models.noise import COUNT, Noise
from models.pixelloss import last_term
from models.sampling.canvas import Batch, LevelSampler
from models.sampling.generate import build_sampler
from models.sampling.guidance import Guidance
from models.sampling.options import SamplingOptions
from models.sampling.prepare import Setup

ATEN, FLASH = torch.ops.aten, "_scaled_dot_product_flash_attention"
COUNTED_AS = {  # torch counts the attention of GPUs only
    getattr(ATEN, f"{FLASH}_for_cpu{end}"): getattr(ATEN, FLASH + end) for end in ("", "_backward")
}


class Operations(TorchDispatchMode):
    """Lists what runs: the part of the model that has begun, matrix-product operations, and bytes."""

    def __init__(self):
        super().__init__()
        self.part, self.found = 0, []

    def begin(self, part: int, *_) -> None:
        self.part = part

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if function.namespace == "aten" and not function.is_view and packet is not ATEN._unsafe_view:
            counter = flop_registry.get(COUNTED_AS.get(packet, packet), lambda *_, **__: 0)
            count = counter(*args, **(kwargs or {}), out_val=result)
            tensors = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
            self.found.append((self.part, count, sum(x.numel() * x.element_size() for x in tensors)))
        return result


def count_flops(call: Callable[[], object]) -> FlopCounterMode:
    """torch's counter after `call` on meta tensors. Only matrix products count, two operations a
    multiply-add.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter


def forward_cost(model: FractalGen) -> tuple[list[int], list[int]]:
    """Operations of one forward pass as the paper counts it, and the sizes of the attention matrices.

    It has batch 1, every patch of every level, transformer blocks without condition tokens, and at the RGB
    head the projection of the condition; neither embeddings nor logits. The sizes are the entries of the
    matrices of one head and block, by level above the pixel, from the operations of the products with them
    (two multiply-adds a channel).
    """
    flops, entries, num_images = [], [], 1
    for generator in model.generators:
        spec = generator.spec
        tokens = torch.empty(num_images, spec.num_patches, spec.embed_dim, device="meta")
        counter = count_flops(lambda generator=generator, tokens=tokens: generator.run(tokens))
        operators = counter.get_flop_counts()["Global"].items()
        attention = sum(n for name, n in operators if "bmm" in str(name) or "attention" in str(name))
        flops.append(counter.get_total_flops())
        entries.append(attention // (4 * spec.embed_dim * spec.num_blocks))
        num_images *= spec.num_patches
    *_, head = softmax_heads(model)
    cond = torch.empty(num_images, head.cond_proj.in_features, device="meta")
    tokens = torch.empty(num_images, model.alphabet.channels, head.cond_proj.out_features, device="meta")
    flops.append(count_flops(lambda: (head.cond_proj(cond), head.run(tokens))).get_total_flops())
    return flops, entries


def patches_in_training(generator: Generator) -> int:
    """How many patches of an image a level passes down in training, on average, rounded; all where it draws
    no mask.
    """
    spec, n = generator.spec, 64
    noise = Noise.of_images(0, range(n), (spec.img_size, spec.patch_size))
    noise.maps[0][:, COUNT] = ((torch.arange(n) + 0.5) / n).view(n, *[1] * (1 + len(spec.grid)))
    mask = generator.draw_mask(noise, train=True)
    return spec.num_patches if mask is None else round(len(mask.rows) / n)


def masked_forward(
    model: FractalGen, patches: Sequence[int], batch_size: int = 1
) -> Callable[[], torch.Tensor]:
    """The forward pass where each image of a level passes down so many `patches`, on the model's device.

    Its tensors have no values: the device is meta, or there is a FakeTensorMode.
    """
    shape, masks = (batch_size, model.alphabet.channels, *model.image_shape), []
    with next(model.parameters()).device:
        images = accumulate(patches, mul, initial=batch_size)  # of each level
        for generator, (above, below) in zip(model.generators, pairwise(images), strict=True):
            masked = torch.ones(above, generator.spec.num_patches, dtype=torch.bool)
            masks.append(Mask(masked, torch.empty(below, dtype=torch.long)))
        batch, labels = torch.empty(shape), torch.empty(batch_size, dtype=torch.long)
    return lambda: model(batch, labels, masks=masks)


def training_flops(model: FractalGen) -> list[int]:
    """Operations of one image's forward pass in training.

    It counts all that runs, condition tokens, guiding heads, embeddings and logits too, for the average
    number of masked patches.
    """
    patches = [patches_in_training(generator) for generator in model.generators]
    counts = count_flops(masked_forward(model, patches)).get_flop_counts()
    *levels, last = (f"FractalGen{'.next_fractal' * level}" for level in range(len(patches) + 1))
    return [sum(counts[name].values()) for name in (*(f"{level}.generator" for level in levels), last)]


def sampling_cost(model: FractalGen, options: SamplingOptions) -> tuple[list[int], dict[str, int]]:
    """Operations of sampling one image, and how often each network is called.

    A guiding head's operations are among its level's. The networks are "level0", "guiding1", …, and "rgb" or
    "cell". One is called once for all images of a step, so as often for a batch as for one image; the
    channels of a head are one call. Of the guidance scale only counts whether it is 1. The cost is measured
    with one block and with two at every level: each further block costs as much as the second.
    """
    depths = model.arguments["num_blocks_list"]
    found = []
    for depth in (1, 2):
        blocks = [min(depth, own) for own in depths]
        with torch.device("meta"):
            shallow = FractalGen(**{**model.arguments, "num_blocks_list": blocks})
        found.append(_sampling_cost(shallow, options))
    (one, calls), (two, _) = found
    return [f1 + (n - 1) * (f2 - f1) for n, f1, f2 in zip(depths, one, two, strict=True)], calls


def _sampling_cost(model: FractalGen, options: SamplingOptions) -> tuple[list[int], dict[str, int]]:
    guidance = Guidance(
        filter_threshold=0.0, pick=lambda _, uniforms: uniforms.long(), doubled=options.guidance_scale != 1
    )
    with torch.device("meta"), torch.no_grad():
        sampler = build_sampler(model, Setup(model.generator.dtype, options))
    flops, calls, num_images, num_calls = [], {}, 1, 1
    channels = model.alphabet.channels
    for level, num_iter in enumerate(options.num_inference_steps):
        spec = sampler.generator.spec
        noise = Noise.of_images(0, [0], model.shapes[level:], "meta", channels)
        of_one, steps = _level_flops(sampler, num_iter, guidance, noise)
        if spec.guiding_pixel:
            calls[f"guiding{level}"] = num_calls
        num_calls *= steps
        calls[f"level{level}"] = num_calls
        flops.append(num_images * of_one)
        num_images *= spec.num_patches
        sampler = sampler.child
    cond = torch.empty(1 + guidance.doubled, sampler.cond_proj.transposed.shape[0], device="meta")
    noise = Noise([torch.empty(1, COUNT.stop + channels, *[1] * len(spec.grid), device="meta")])
    last = count_flops(lambda: sampler.sample(Batch([cond], guidance, noise)))
    return [*flops, num_images * last.get_total_flops()], {**calls, last_term(channels): num_calls}


def _level_flops(sampler: LevelSampler, num_iter: int, guidance: Guidance, noise: Noise) -> tuple[int, int]:
    """Operations of one image of a level, without what is below it, and its number of steps.

    Of the steps that decide as many patches after as many, only the first and the last are measured: what
    such a step costs grows evenly with its place (an AR level's attention), or not at all. With a feature
    cache all are measured.
    """
    generator, spec = sampler.generator, sampler.generator.spec
    cond = torch.empty(1 + guidance.doubled, spec.cond_dim, device="meta")
    batch = Batch([cond] * sampler.num_conds, guidance, noise)
    start = lambda: sampler.start(batch, generator.order(noise.order_uniforms))  # noqa: E731
    total, alike, before = count_flops(start).get_total_flops(), defaultdict(list), 0
    plan = list(generator.plan(num_iter))
    cached = spec.index == 0 and sampler.setup.options.feature_cache_interval > 1
    for begin, end, _ in plan:
        alike[before, end - begin, begin if cached else None].append((begin, end))
        before = end - begin
    with torch.device("meta"), torch.no_grad():
        state = start()
    for (before, *_), spans in alike.items():
        new = torch.empty(1, before, spec.patch_dim, device="meta") if before else None
        ends = {spans[0], spans[-1]}
        calls = [lambda span=span, new=new: sampler.predict(state, new, *span) for span in ends]
        total += sum(count_flops(call).get_total_flops() for call in calls) * len(spans) // len(ends)
    return total, len(plan)
