"""The settings of one sampling call, in one object (docs/format.md, "Sampling")."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import prod
from numbers import Integral

from torch import Tensor

from models.patches import Shape, grid_of
from models.sampling.guidance import Guidance, inverse_cdf
from util.errors import ArgumentError, one_line, warn_once, whole_number
from util.precision import DTYPES

# What the published call and its flags call the options that have other names there.
PUBLISHED = {
    "num_inference_steps": "num_iter_list", "guidance_scale": "cfg", "guidance_schedule": "cfg_schedule",
}  # fmt: skip


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled (docs/format.md, "Sampling").

    `model.sampling_defaults` holds the defaults of a model; presets carry the best published ones.

    num_inference_steps     one number of steps, at least 1, for each level above the pixel, or one number for
                            all of them. No level takes more steps than it has patches, and an AR level
                            always takes as many
    guidance_scale          classifier-free guidance, from 1 (none). Scale and temperature may also be lists
                            with one number for each level above the pixel, for the softmax below the level:
                            first for guiding pixels, then for the pixels themselves
    guidance_schedule       a name of `guidance.SCHEDULES`
    temperature             multiplies the logits: above 1 is sharper, the reverse of other libraries, which
                            divide by it. Any number above 0
    filter_threshold        from 0 to 1; protects improbable values from guidance, see
                            `Guidance.probabilities`
    chunk                   the largest number of patches that a level below level 0 samples together; None:
                            all patches of a step. It bounds memory and changes nothing except rounding
    compiled                runs torch.compile on the functions that are called most, on CUDA as graphs
    feature_cache_interval  i above 1: level 0 computes all features only in every i-th step, an approximation
                            that needs a level 0 with a feature cache (see `MARSampler`); 1: in every step
    watch_levels            the number of levels, from level 0 down, whose steps call the step callback, which
                            always sees the whole image; at least 1
    amp                     dtype of matrix products outside torch.autocast: "bf16", "fp16", "off" (that of
                            the weights); None: bfloat16 where that is faster, see `sampling_dtype`
    """

    num_inference_steps: int | Sequence[int] = ()
    guidance_scale: float | Sequence[float] = 1.0
    guidance_schedule: str = "linear"
    temperature: float | Sequence[float] = 1.0
    filter_threshold: float = 1e-4
    chunk: int | None = None
    compiled: bool = False
    feature_cache_interval: int = 1
    watch_levels: int = 1
    amp: str | None = None

    @classmethod
    def of_sizes(cls, shapes: Sequence[Shape]) -> "SamplingOptions":
        """One step a patch, at most 64, for each level of a model whose images have these sides."""
        return cls(tuple(min(64, prod(grid_of(*pair))) for pair in pairwise(shapes)))

    def guidance(
        self,
        num_levels: int,
        pick: Callable[[Tensor, Tensor], Tensor] = inverse_cdf,
        has_feature_cache: bool = True,
    ) -> Guidance:
        """Checks the settings for a model with `num_levels` levels above the pixel; returns their Guidance.

        `has_feature_cache` says whether level 0 has one. Raises ValueError that names the setting.
        """
        check_steps(self.num_inference_steps, num_levels)
        if self.amp not in (None, "off", *DTYPES):
            raise ArgumentError("amp", f"{self.amp!r} must be None or one of off, {', '.join(DTYPES)}")
        if self.chunk is not None:
            whole_number("chunk", self.chunk, 1)
        whole_number("watch_levels", self.watch_levels, 1)
        interval = whole_number("feature_cache_interval", self.feature_cache_interval, 1)
        if interval > 1 and not has_feature_cache:
            raise ArgumentError(
                "feature_cache_interval",
                f"{interval} must be 1, or above 1 for a model whose level 0 has a feature cache (mar)",
            )
        return Guidance.create(
            self.guidance_scale,
            self.guidance_schedule,
            self.temperature,
            self.filter_threshold,
            pick,
            num_levels,
        )


# A mapping for `naming`: the flags of main_fractalgen.py that set the options.
FLAGS = {field.name: f"--{PUBLISHED.get(field.name, field.name)}" for field in fields(SamplingOptions)}


def check_steps(num_inference_steps: int | Sequence[int], num_levels: int) -> tuple[int, ...]:
    """Returns the number of steps of each level (docs/format.md, "Sampling").

    One number counts for all levels. Raises ArgumentError unless there is a positive one for each level.
    """
    steps = num_inference_steps
    steps = steps.tolist() if hasattr(steps, "tolist") else steps
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        return (whole_number("num_inference_steps", steps, 1),) * num_levels
    if len(steps) != num_levels:
        raise ArgumentError(
            "num_inference_steps",
            f"{one_line(','.join(map(str, steps)))} must be {num_levels} numbers, the steps of each level "
            "above the pixel",
        )
    return tuple(whole_number("num_inference_steps", number, 1) for number in steps)


def steps_of_levels(model, num_inference_steps: int | Sequence[int] | None) -> tuple[int, ...]:
    """Returns the number of steps of each level of `model`: those that are given, or its default.

    A line warns where a level has fewer patches than it is given steps. One number for all levels may be more
    than some of them have, which then take one step for each patch. Raises ArgumentError as `check_steps`.
    """
    default = model.sampling_defaults.num_inference_steps
    given = default if num_inference_steps is None else num_inference_steps
    steps = check_steps(given, len(model.generators))
    patches = [generator.spec.num_patches for generator in model.generators]
    if isinstance(given, Integral) and given <= max(patches):
        steps = tuple(map(min, steps, patches))
    excess = [level for level, number in enumerate(steps) if number > patches[level]]
    if excess:
        levels = [f"level {i} takes {patches[i]} instead of {steps[i]} steps" for i in excess]
        warn_once(f"more steps than patches: {', '.join(levels)}, one for each patch")
    return steps
