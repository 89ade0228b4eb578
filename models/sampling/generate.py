"""From class labels to images: what `model.generate` does around the sampler.

Letters: B images, H image side, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.noise import Noise
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from util.errors import UserError
from util.pixels import to_numpy, to_pil

OUTPUT_TYPES = {"pil": to_pil, "np": to_numpy, "pt": lambda images: images}


@dataclass(frozen=True)
class SamplingDefaults:
    """What `generate` uses where its caller says nothing; presets carry the best published settings."""

    num_inference_steps: tuple[int, ...]
    guidance_scale: float = 1.0
    guidance_schedule: str = "linear"
    temperature: float = 1.0
    filter_threshold: float = 1e-4

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> "SamplingDefaults":
        """One step a patch, at most 64, at each level of image sides `sizes`."""
        return cls(tuple(min(64, (a // b) ** 2) for a, b in pairwise(sizes)))


def validate_num_iters(num_iter_list: Sequence[int], num_levels: int) -> None:
    """Raises ValueError unless there is one positive number of steps for each level above the pixel."""
    if len(num_iter_list) != num_levels or any(n < 1 for n in num_iter_list):
        given = ",".join(map(str, num_iter_list))
        raise ValueError(
            f"num_iter_list {given} must be {num_levels} positive numbers, the steps of each level"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """On a CPU torch has no class of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's mode as it was afterwards, also after an exception."""
    was_training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in was_training:
            m.training = True


@torch.no_grad()
def generate(
    model,
    class_labels: int | Sequence[int] | Tensor | None = None,
    *,
    num_images: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_schedule: str | None = None,
    num_inference_steps: Sequence[int] | None = None,
    temperature: float | Sequence[float] | None = None,
    filter_threshold: float | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    indices: Sequence[int] | None = None,
    chunk: int | None = None,
    compiled: bool = False,
    refresh: int = 1,
    output_type: str = "pil",
    callback_on_step_end: Callable[[int, int, Tensor], None] | None = None,
    watch_levels: int = 1,
    progress_bar: bool = True,
    given: KnownPixels | None = None,
):
    """Draws one image for each class label. Settings left out are the model's best published ones.

    class_labels          0..class_num-1, one for each image; None: unconditional, `num_images` of them (default 1)
    guidance_scale        1 = no guidance; see models/sampling/guidance.py for it, guidance_schedule, temperature, filter_threshold.
                          Scale and temperature may be lists, a number for the softmax below each level above the pixel: those
                          of guiding pixels, unused where a level has none, and the pixels' own last
    num_inference_steps   one number of steps for each level above the pixel
    seed / generator      image i of a seed is the same whatever else is drawn with it; a generator gives a seed. A list of
                          seeds, one for each level above the pixel, draws one level's choices anew with the others' dice kept
    indices               the images' numbers i within the seed; default 0, 1, …
    chunk, compiled, refresh  see `FractalGen.sample`
    output_type           "pil": list of RGB images; "np": uint8 (B, H, H, 3); "pt": normalised float (B, 3, H, H)
    callback_on_step_end  called with (step, number of steps, canvas (B, 3, H, H)) after each step of level 0
    watch_levels          above 1: it also sees the canvas within a step, after each step of so many levels
    given                 what is known of the images: what `model.edit` gives

    Raises ValueError for a setting or label out of range.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}; one of {', '.join(OUTPUT_TYPES)}")
    defaults = model.sampling_defaults
    labels = check_labels(class_labels, model.class_num)
    if labels is None:
        n = 1 if num_images is None else num_images
        if guidance_scale not in (None, 1, 1.0):
            raise ValueError(
                f"guidance_scale {guidance_scale} needs class_labels; unconditional images have 1"
            )
        scale = 1.0
    else:
        n = len(labels)
        if num_images not in (None, n):
            raise ValueError(f"num_images {num_images} contradicts the {n} class_labels")
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    indices = range(n) if indices is None else indices
    if len(indices) != n:
        raise ValueError(f"indices must hold one number for each of the {n} images, got {len(indices)}")

    unconditional = model.fake_latent.repeat(n, 1)
    device = unconditional.device
    cond = unconditional if labels is None else model.class_emb(torch.tensor(labels, device=device))
    settings = (
        scale,
        defaults.guidance_schedule if guidance_schedule is None else guidance_schedule,
        defaults.temperature if temperature is None else temperature,
        defaults.filter_threshold if filter_threshold is None else filter_threshold,
    )
    if Guidance.create(*settings, num_levels=len(model.generators)).doubled:
        cond = torch.cat([cond, unconditional])
    if seed is None:
        seed = int(
            torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None)
        )
    elif generator is not None:
        raise ValueError("give seed or generator, not both")
    bar = tqdm(desc="sampling", unit="step", disable=not progress_bar)

    def on_step(step: int, num_steps: int, canvas: Tensor) -> None:
        bar.total = num_steps
        bar.update(step + 1 - bar.n)
        if callback_on_step_end is not None:
            callback_on_step_end(step, num_steps, canvas)

    with bar:
        images = model.sample(
            [cond] * model.num_conds,
            defaults.num_inference_steps if num_inference_steps is None else num_inference_steps,
            *settings,
            chunk=chunk,
            compiled=compiled,
            refresh=refresh,
            noise=Noise.of_images(seed, indices, model.noise_sizes, device),
            on_step=on_step,
            watch_levels=watch_levels,
            given=given,
        )
    return OUTPUT_TYPES[output_type](images)


def check_labels(labels, class_num: int) -> list[int] | None:
    """One label or several, or None -> a list, or None. Raises ValueError for one that is none of 0..class_num-1."""
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
    """`check_labels` of one label for all images, or one each -> one each, or None."""
    labels = check_labels(labels, class_num)
    if labels is None:
        return None
    if len(labels) not in (1, num_images):
        raise UserError(f"{len(labels)} class_labels for {num_images} images; give one, or one each")
    return labels if len(labels) == num_images else labels * num_images
