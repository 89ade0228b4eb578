"""From class labels to images: what surrounds the samplers in one call (paper, 3.2 and 5.2).

Letters: B images, H image side, D width, h halves (2 with guidance, otherwise 1).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.attention import full_precision
from models.noise import Noise
from models.sampling import ar, mar  # noqa: F401  importing them registers their samplers
from models.sampling.canvas import Batch, OnStep, Sampler, sampler_class
from models.sampling.finite import check_finite
from models.sampling.guidance import inverse_cdf
from models.sampling.known import KnownPixels
from models.sampling.options import SamplingOptions
from models.sampling.pixel import PixelSampler
from models.sampling.precision import few_threads, sampling_dtype
from models.sampling.prepare import Setup
from util.errors import UserError
from util.pixels import NotebookCanvas, to_numpy, to_pil

OUTPUT_TYPES = {"pil": to_pil, "np": to_numpy, "pt": lambda images: images}


def build_sampler(fractal: nn.Module, setup: Setup) -> Sampler:
    """Builds the samplers of a FractalGen and of all levels in it, down to the RGB head (paper, 3.1).

    They are made for one call. `fractal` may also be the RGB head itself.
    """
    generators = []
    while hasattr(fractal, "next_fractal"):
        generators.append(fractal.generator)
        fractal = fractal.next_fractal
    sampler = PixelSampler(fractal, setup)
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
    """Samples normalised images (B, 3, H, H) from conditions (docs/format.md, "Sampling").

    conds           `model.num_conds` conditions, each (h * B, D): with guidance class conditions, then
                    `fake_latent`
    noise           the random numbers of the images; default: drawn, with a seed from torch's generator
    pick            see `Guidance`
    on_step, known  see `Batch`

    Raises ValueError for too few conditions, options out of range, and images or weights that are not finite.
    """
    num_levels, rows, device = len(model.generators), len(conds[0]), conds[0].device
    guidance = options.guidance(num_levels, pick, model.generator.has_feature_cache)
    if len(conds) < model.num_conds or (guidance.doubled and rows % 2):
        raise ValueError(
            f"cond_list must hold {model.num_conds} conditions, with cfg != 1 of an even number of rows; "
            f"got {len(conds)} of {rows} rows"
        )
    if noise is None:
        indices = range(rows // 2 if guidance.doubled else rows)
        noise = Noise.of_images(int(torch.randint(2**63 - 1, ())), indices, model.noise_sizes, device)
    if known is not None and not known.hidden.any():
        return known.images.clone()
    dtype = sampling_dtype(model, options.amp)
    with eval_mode(model), full_precision(conds[0]), few_threads(model, len(noise)), torch.inference_mode():
        sampler = build_sampler(model, Setup(dtype, options))
        images = sampler.sample(Batch(conds, guidance, noise, options.num_inference_steps, known, on_step))
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
    """The published call (docs/format.md, "Published names and flags"): normalised images (B, 3, H, H).

    cond_list      `num_conds` conditions, each (B, D), or with cfg != 1 (2 B, D): class conditions, then
                   `fake_latent`
    num_iter_list  the numbers of steps of the levels, `num_inference_steps` of `SamplingOptions`
    fractal_level  the level of this module; another number raises ValueError
    visualize      shows the growing canvas in a notebook

    cfg … filter_threshold and `settings` are the other fields of `SamplingOptions`, of which amp is "off" by
    default: as published, the dtype is that of the weights or of torch.autocast. The rest is for
    `sample_images`. Raises ValueError for settings out of range. `generate` is the convenient call.
    """
    if fractal_level != model.fractal_level:
        raise ValueError(f"fractal_level {fractal_level} given to the module of level {model.fractal_level}")
    on_step = NotebookCanvas(then=on_step) if visualize else on_step
    steps = tuple(num_iter_list)
    settings = {"amp": "off", **settings}
    options = SamplingOptions(steps, cfg, cfg_schedule, temperature, filter_threshold, **settings)
    return sample_images(model, cond_list, options, noise, pick, on_step, known)


def generate(
    model,
    class_labels: int | Sequence[int] | Tensor | None = None,
    *,
    num_images: int | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    indices: Sequence[int] | None = None,
    output_type: str = "pil",
    callback_on_step_end: OnStep | None = None,
    progress_bar: bool = True,
    known: KnownPixels | None = None,
    **settings,
):
    """Samples one image for each class label (paper, 5.2).

    class_labels  0..class_num-1, one for each image; None: `num_images` unconditional images (default 1)
    seed          from 0 to 2**63 - 1; image i of a seed is the same whatever else is sampled with it. Or a
                  list of seeds, one for each level above the pixel: to change one of them resamples one level
                  and keeps the random numbers of the others
    generator     draws the seed, where none is given; giving both raises ValueError
    indices       the numbers i of the images within the seed; default 0, 1, …
    output_type   "pil": list of RGB images; "np": uint8 (B, H, H, 3); "pt": normalised float (B, 3, H, H)
    callback_on_step_end  called with (step, number of steps, canvas (B, 3, H, H)) after each step of level 0
    known         the known pixels of the images, as `model.edit` passes them; None: there are none
    settings      fields of `SamplingOptions`, such as guidance_scale, temperature, num_inference_steps or
                  chunk; default, and where None: as in `model.sampling_defaults`

    Raises ValueError for a setting or label out of range.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}; one of {', '.join(OUTPUT_TYPES)}")
    labels, scale = check_labels(class_labels, model.class_num), settings.get("guidance_scale")
    if labels is None:
        n = 1 if num_images is None else num_images
        if scale not in (None, 1, 1.0):
            raise ValueError(f"guidance_scale {scale} needs class_labels; unconditional images have 1")
        settings = {**settings, "guidance_scale": 1.0}
    else:
        n = len(labels)
        if num_images not in (None, n):
            raise ValueError(f"num_images {num_images} contradicts the {n} class_labels")
    indices = range(n) if indices is None else indices
    if len(indices) != n:
        raise ValueError(f"indices must hold one number for each of the {n} images, got {len(indices)}")
    options = replace(model.sampling_defaults, **{name: x for name, x in settings.items() if x is not None})
    with torch.no_grad():
        cond = unconditional = model.fake_latent.repeat(n, 1)
        if labels is not None:
            cond = model.class_emb(torch.tensor(labels).to(cond.device, non_blocking=True))
        if options.guidance(len(model.generators)).doubled:
            cond = torch.cat([cond, unconditional])
    if seed is None:
        device = generator.device if generator is not None else None
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    elif generator is not None:
        raise ValueError("give seed or generator, not both")
    noise = Noise.of_images(seed, indices, model.noise_sizes, cond.device)
    sampling_dtype(model, options.amp)  # it may log a line, which shall come before the bar
    with tqdm(desc="sampling", unit="step", disable=not progress_bar) as bar:

        def on_step(step: int, num_steps: int, canvas: Tensor) -> None:
            bar.total = num_steps
            bar.update(step + 1 - bar.n)
            if callback_on_step_end is not None:
                callback_on_step_end(step, num_steps, canvas)

        images = sample_images(model, [cond] * model.num_conds, options, noise, on_step=on_step, known=known)
    return OUTPUT_TYPES[output_type](images)


def check_labels(labels, class_num: int) -> list[int] | None:
    """Returns one or several labels as a list, and None as None (docs/format.md, "Class conditions and
    levels").

    Raises ValueError for a label out of 0..class_num-1, and for any label if the model has no classes.
    """
    if labels is None:
        return None
    if class_num == 0:
        raise ValueError("the model has no classes: leave class_labels out")
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = list(labels) if isinstance(labels, Iterable) else [labels]
    for label in labels:
        if not (isinstance(label, Integral) and 0 <= label < class_num):
            raise ValueError(
                f"class label {label} is out of range; the model has classes 0 to {class_num - 1}"
            )
    return [int(label) for label in labels]


def labels_of_each(labels, class_num: int, num_images: int) -> list[int] | None:
    """Returns one label for each image (docs/format.md, "Class conditions and levels"), or None.

    `labels` are as in `check_labels`: one for all images, or one for each. Raises ValueError for another
    number.
    """
    labels = check_labels(labels, class_num)
    if labels is None:
        return None
    if len(labels) not in (1, num_images):
        raise UserError(f"{len(labels)} class_labels for {num_images} images; give one, or one each")
    return labels if len(labels) == num_images else labels * num_images


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
