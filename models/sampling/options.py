"""The settings of one sampling call, in one object (docs/format.md, "Sampling")."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from models.sampling.guidance import Guidance, inverse_cdf
from util.precision import DTYPES


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled (docs/format.md, "Sampling").

    `model.sampling_defaults` holds the defaults of a model; presets carry the best published ones.

    num_inference_steps     one number of steps, at least 1, for each level above the pixel; an AR level
                            always takes one step for each patch
    guidance_scale          classifier-free guidance, from 1 (none). Scale and temperature may also be lists
                            with one number for each level above the pixel, for the softmax below the level:
                            first for guiding pixels, then for the pixels themselves
    guidance_schedule       a name of `guidance.SCHEDULES`
    temperature             above 0; multiplies the logits, so that above 1 is sharper
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

    num_inference_steps: tuple[int, ...] = ()
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
    def of_sizes(cls, sizes: Sequence[int]) -> "SamplingOptions":
        """One step a patch, at most 64, for each level of a model with image sides `sizes`."""
        return cls(tuple(min(64, (a // b) ** 2) for a, b in pairwise(sizes)))

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
            raise ValueError(f"unknown amp {self.amp!r}; None or one of off, {', '.join(DTYPES)}")
        if self.feature_cache_interval < 1 or (self.feature_cache_interval > 1 and not has_feature_cache):
            raise ValueError(
                f"feature_cache_interval {self.feature_cache_interval} must be 1, or above 1 for a model "
                "whose level 0 has a feature cache (mar)"
            )
        return Guidance.create(
            self.guidance_scale,
            self.guidance_schedule,
            self.temperature,
            self.filter_threshold,
            pick,
            num_levels,
        )


def check_steps(num_inference_steps: Sequence[int], num_levels: int) -> None:
    """Raises ValueError unless each level has a positive number of steps (docs/format.md, "Sampling")."""
    if len(num_inference_steps) != num_levels or any(n < 1 for n in num_inference_steps):
        given = ",".join(map(str, num_inference_steps))
        raise ValueError(
            f"num_iter_list {given} must be {num_levels} positive numbers, the steps of each level"
        )
