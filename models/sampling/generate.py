"""From class labels to images: what surrounds the samplers in one call (paper, 3.2 and 5.2).

Letters: B images, C channels, S an image's sides, D width, h halves (2 with guidance, otherwise 1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.attention import full_precision
from models.noise import Noise
from models.sampling import ar, mar  # noqa: F401  importing them registers their samplers
from models.sampling.canvas import Batch, OnStep, Sampler, sampler_class
from models.sampling.guidance import inverse_cdf
from models.sampling.known import KnownPixels
from models.sampling.labels import Label, check_labels
from models.sampling.options import PUBLISHED, SamplingOptions, steps_of_levels
from models.sampling.pixel import PixelSampler
from models.sampling.precision import check_finite, few_threads, sampling_dtype
from models.sampling.prepare import Setup
from util.errors import ArgumentError, UserError, naming, whole_number
from util.pixels import NotebookCanvas


def build_sampler(fractal: nn.Module, setup: Setup) -> Sampler:
    """Builds the samplers of a FractalGen and of all levels in it, down to the head (paper, 3.1).

    They are made for one call. `fractal` may also be the head itself.
    """
    generators = []
    while hasattr(fractal, "next_fractal"):
        generators.append(fractal.generator)
        fractal = fractal.next_fractal
    sampler = PixelSampler(fractal, setup, axes=len(generators[-1].spec.grid) if generators else 2)
    for generator in reversed(generators):
        sampler = sampler_class(generator)(generator, sampler, setup)
    return sampler


@torch.no_grad()
def sample_images(
    model,
    conds: Sequence[Tensor],
    options: SamplingOptions,
    noise: Noise | None = None,
    pick: Callable[[Tensor, Tensor], Tensor] = inverse_cdf,
    on_step: OnStep | None = None,
    known: KnownPixels | None = None,
) -> Tensor:
    """Samples normalised images (B, C, *S), float32, from conditions (docs/format.md, "Sampling").

    conds           `model.num_conds` conditions, each (h * B, D): with guidance class conditions, then
                    `fake_latent`
    noise           the random numbers of the images; default: drawn, with a seed from torch's generator
    pick            see `Guidance`
    on_step, known  see `Batch`

    Raises UserError for too few conditions, options out of range, and images or weights that are not finite.
    """
    num_levels, num_conds, width = len(model.generators), model.num_conds, model.fake_latent.shape[1]
    guidance = options.guidance(num_levels, pick, model.generator.has_feature_cache)
    steps = steps_of_levels(model, options.num_inference_steps)
    rows = len(conds[0]) if len(conds) and isinstance(conds[0], Tensor) else 0
    if len(conds) < num_conds or any(getattr(x, "shape", None) != (rows, width) for x in conds[:num_conds]):
        raise ArgumentError("cond_list", f"must hold {num_conds} tensors of one shape, (rows, {width})")
    if guidance.doubled and rows % 2:
        raise ArgumentError("cond_list", f"has {rows} rows; guidance needs an even number of rows")
    device = conds[0].device
    if noise is None:
        indices = range(rows // 2 if guidance.doubled else rows)
        noise = model.noise(int(torch.randint(2**63 - 1, ())), indices, device)
    if known is not None and not known.hidden.any():
        return known.images.clone()
    dtype = sampling_dtype(model, options.amp)
    with eval_mode(model), full_precision(conds[0]), few_threads(model, len(noise)), torch.inference_mode():
        sampler = build_sampler(model, Setup(dtype, options))
        images = sampler.sample(Batch(conds, guidance, noise, steps, known, on_step))
    settings = f"temperature {options.temperature}, guidance scale {options.guidance_scale} or {dtype}"
    check_finite(model, images, f"the images are not finite: {settings} makes numbers overflow")
    return images.clone()  # an ordinary tensor


def sample(
    model,
    cond_list: Sequence[Tensor],
    num_iter_list: Sequence[int],
    cfg: float | Sequence[float] = 1.0,
    cfg_schedule: str = "linear",
    temperature: float | Sequence[float] = 1.0,
    filter_threshold: float = 1e-4,
    fractal_level: int = 0,
    visualize: bool = False,
    *,
    noise: Noise | None = None,
    pick: Callable[[Tensor, Tensor], Tensor] = inverse_cdf,
    on_step: OnStep | None = None,
    known: KnownPixels | None = None,
    **settings,
) -> Tensor:
    """The published call (docs/format.md, "Published names and flags"): normalised images (B, C, *S).

    cond_list      `num_conds` conditions, each (B, D), or with cfg != 1 (2 B, D): class conditions, then
                   `fake_latent`
    num_iter_list  the numbers of steps of the levels, `num_inference_steps` of `SamplingOptions`
    temperature    multiplies the logits: above 1 is sharper, the reverse of other libraries, which divide by
                   it
    fractal_level  the level of this module; another number raises ValueError
    visualize      shows the growing canvas in a notebook

    cfg … filter_threshold and `settings` are the other fields of `SamplingOptions`, of which amp is "off" by
    default: as published, the dtype is that of the weights or of torch.autocast. The rest is for
    `sample_images`. Raises UserError for settings out of range. `generate` is the convenient call.
    """
    if fractal_level != model.fractal_level:
        raise ArgumentError(
            "fractal_level", f"{fractal_level} is not this module's, which is {model.fractal_level}"
        )
    on_step = NotebookCanvas(model.alphabet, then=on_step) if visualize else on_step
    settings = {"amp": "off", **settings}
    options = SamplingOptions(num_iter_list, cfg, cfg_schedule, temperature, filter_threshold, **settings)
    with naming(PUBLISHED):
        return sample_images(model, cond_list, options, noise, pick, on_step, known)


def generate(
    model,
    class_labels: Label | Sequence[Label] | Tensor | None = None,
    *,
    num_images: int | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    indices: Sequence[int] | None = None,
    output_type: str | None = None,
    callback_on_step_end: OnStep | None = None,
    progress_bar: bool = True,
    known: KnownPixels | None = None,
    **settings,
):
    """Samples one image for each class label (paper, 5.2).

    class_labels  one for each image, a number 0..class_num-1 or a name of `model.class_names`; None:
                  `num_images` unconditional images (default 1)
    seed          from 0 to 2**63 - 1; image i of a seed is the same whatever else is sampled with it. Or a
                  list of seeds, one for each level above the pixel: to change one of them resamples one level
                  and keeps the random numbers of the others
    generator     draws the seed, where none is given; giving both raises ValueError
    indices       the numbers i of the images within the seed; default 0, 1, …
    output_type   "pil": a list of grey, RGB or RGBA images; "np": values, an integer array (B, *S, C); "pt":
                  normalised float (B, C, *S). Default: "pil", or "np" where `Alphabet.is_image` is False
    callback_on_step_end  called with (step, number of steps, canvas (B, C, *S)) after each step of level 0
    known         the known pixels of the images, as `model.edit` passes them; None: there are none
    settings      fields of `SamplingOptions`, such as guidance_scale, temperature, num_inference_steps or
                  chunk; default, and where None: as in `model.sampling_defaults`

    Raises UserError for a setting or class out of range.
    """
    convert = converter(model, output_type)
    labels = check_labels(model, class_labels)
    n = len(labels) if labels is not None else 1
    if num_images is not None:
        n = whole_number("num_images", num_images, 1)
    if labels is not None and len(labels) != n:
        raise ArgumentError("num_images", f"{n} contradicts the {len(labels)} class_labels")
    indices = range(n) if indices is None else indices
    if not hasattr(indices, "__len__") or len(indices) != n:
        raise ArgumentError("indices", f"must hold one number for each of the {n} images")
    options = replace(model.sampling_defaults, **{name: x for name, x in settings.items() if x is not None})
    doubled = options.guidance(len(model.generators)).doubled
    if labels is None and doubled:
        if settings.get("guidance_scale") is not None:
            scale = options.guidance_scale
            raise ArgumentError("guidance_scale", f"{scale} needs class_labels; unconditional images have 1")
        options, doubled = replace(options, guidance_scale=1.0), False
    with torch.no_grad():
        cond = unconditional = model.fake_latent.repeat(n, 1)
        if labels is not None:
            cond = model.class_emb(torch.tensor(labels).to(cond.device, non_blocking=True))
        if doubled:
            cond = torch.cat([cond, unconditional])
    if not isinstance(generator, torch.Generator | None):
        raise ArgumentError("generator", f"{generator!r} must be a torch.Generator")
    if not (callback_on_step_end is None or callable(callback_on_step_end)):
        raise ArgumentError("callback_on_step_end", f"{callback_on_step_end!r} must be a function")
    if seed is None:
        device = generator.device if generator is not None else None
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    elif generator is not None:
        raise UserError("give seed or generator, not both")
    noise = model.noise(seed, indices, cond.device)
    # These two may log a line, which shall come before the bar.
    options = replace(options, num_inference_steps=steps_of_levels(model, options.num_inference_steps))
    sampling_dtype(model, options.amp)
    with tqdm(desc="sampling", unit="step", disable=not progress_bar) as bar:

        def on_step(step: int, num_steps: int, canvas: Tensor) -> None:
            bar.total = num_steps
            bar.update(step + 1 - bar.n)
            if callback_on_step_end is not None:
                callback_on_step_end(step, num_steps, canvas)

        images = sample_images(model, [cond] * model.num_conds, options, noise, on_step=on_step, known=known)
    return convert(images)


def converter(model, output_type: str | None) -> Callable[[Tensor], object]:
    """What turns normalised images (B, C, *S) into an `output_type` of `generate`; raises ArgumentError."""
    outputs = {"np": model.alphabet.to_numpy, "pt": lambda images: images}
    if model.alphabet.is_image(model.image_shape):
        outputs = {"pil": model.alphabet.to_pil, **outputs}
    output_type = next(iter(outputs)) if output_type is None else output_type
    if output_type not in tuple(outputs):
        raise ArgumentError("output_type", f"{output_type!r} must be one of {', '.join(outputs)}")
    return outputs[output_type]


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether memory ran out; on a CPU torch has no exception of its own for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Turns dropout (docs/format.md, "MAR levels") off inside; a context manager.

    Afterwards, also after an exception, every submodule has its mode again.
    """
    was_training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in was_training:
            m.training = True
