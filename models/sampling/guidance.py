"""Classifier-free guidance of a softmax (paper, 4.1; docs/format.md, "Sampling").

Letters: N rows, V values; logits are float32. A doubled batch holds the class-conditional rows, then the
unconditional rows.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from util.errors import ArgumentError, one_line, real_number

# Called with the guidance scale and the progress of level 0, from 0 to 1; returns the scale of the step.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda scale, progress: 1 + (scale - 1) * progress,
    "constant": lambda scale, progress: scale,
}
MIN_POSITIVE = sys.float_info.min


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one value in each row (docs/format.md, "Sampling"), never one of probability 0.

    Probabilities (N, V) and uniforms (N,) in [0, 1) -> values (N,) int64. The value of a row that is not
    finite means nothing; it is from 0 to V.
    """
    cdf = probs.cumsum(-1)
    threshold = uniforms[:, None] * cdf[:, -1:]
    # The threshold is below the last sum, also when it is rounded, because a float32 below 1 is at most
    # 1 - 2**-24: the value is at most V - 1.
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1)


@dataclass(frozen=True)
class Guidance:
    """How logits become values (docs/format.md, "Sampling").

    scale             guidance scale from 1, as in (F7); 1 means no guidance and no second half
    schedule          a name of SCHEDULES: how the scale grows with the progress of level 0
    temperature       multiplies the logits: above 1 is sharper, the reverse of other libraries, which divide
                      by it
    filter_threshold  where the conditional probability is below it, the unconditional logit is lifted
    pick              (probabilities (N, V), uniforms (N,)) -> values (N,) int64
    doubled           whether the batch holds an unconditional half
    heads             where scales or temperatures differ: one Guidance for the softmax below each level
    """

    scale: float | Tensor = 1.0
    schedule: str = "linear"
    temperature: float = 1.0
    filter_threshold: float = 1e-4
    pick: Callable[[Tensor, Tensor], Tensor] = inverse_cdf
    doubled: bool = False
    heads: tuple["Guidance", ...] = ()

    @classmethod
    def create(
        cls, scale, schedule, temperature, filter_threshold, pick=inverse_cdf, num_levels: int = 1
    ) -> "Guidance":
        """Checks the settings and decides once whether the batch is doubled.

        `scale` and `temperature` are numbers, or lists of one number for each of `num_levels`. Raises
        ValueError that names the setting.
        """
        lists = []
        for name, values, low, wanted in (
            ("guidance_scale", scale, 1.0, "a finite number from 1, which is without guidance"),
            ("temperature", temperature, MIN_POSITIVE, "a finite number above 0"),
        ):
            values = values.tolist() if hasattr(values, "tolist") else values
            if isinstance(values, str) or not isinstance(values, Sequence):
                values = [values] * num_levels
            if len(values) != num_levels:
                wanted = f"one number, or {num_levels}, one for each level above the pixel"
                raise ArgumentError(name, f"{one_line(repr(values))} must be {wanted}")
            lists.append([real_number(name, value, low, sys.float_info.max, wanted) for value in values])
        if schedule not in tuple(SCHEDULES):
            raise ArgumentError(
                "guidance_schedule", f"{one_line(repr(schedule))} must be one of {', '.join(SCHEDULES)}"
            )
        filter_threshold = real_number("filter_threshold", filter_threshold, 0, 1, "a number from 0 to 1")
        doubled = any(value != 1 for value in lists[0])
        heads = tuple(
            cls(one_scale, schedule, one_temperature, filter_threshold, pick, doubled)
            for one_scale, one_temperature in zip(*lists, strict=True)
        )
        return heads[-1] if len(set(heads)) == 1 else replace(heads[-1], heads=heads)

    def head(self, level: int) -> "Guidance":
        """The guidance of the softmax below `level`, which predicts guiding pixels or the pixels."""
        return self.heads[level] if self.heads else self

    def at(self, progress: float, device: torch.device) -> "Guidance":
        """The guidance of a step of level 0; `progress` is a share of its patches, from 0 to 1.

        The scale becomes a tensor on `device`, so that a function that was compiled for one scale fits all
        scales.
        """
        scale = torch.full((), float(SCHEDULES[self.schedule](self.scale, progress)), device=device)
        return replace(self, scale=scale, heads=tuple(head.at(progress, device) for head in self.heads))

    def double(self, x: Tensor) -> Tensor:
        """Repeats rows (N, ...) for both halves of a doubled batch: (2N, ...); otherwise returns `x`."""
        return torch.cat([x, x]) if self.doubled else x

    def part(self, x: Tensor, rows: slice | Tensor) -> Tensor:
        """Selects `rows` of `x`, and in a doubled batch the same rows of each half."""
        return x.unflatten(0, (2, -1))[:, rows].flatten(0, 1) if self.doubled else x[rows]

    def probabilities(self, logits: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Logits (2N or N, V) -> probabilities (N, V) by (F7), and a softmax.

        They are multiplied by exp(log_weights) (N, V) before they are normalised. The temperature comes
        first, then the filter (docs/format.md, "Sampling"). Terms that are constant in a row are left out,
        because the softmax does not depend on them.
        """
        if self.temperature != 1:
            logits = logits * self.temperature
        if self.doubled:
            if self.filter_threshold > 0:
                # With both maxima at 0, the filter needs no difference of maxima.
                logits = logits - logits.amax(-1, keepdim=True)
            cond, uncond = logits.chunk(2)
            if self.filter_threshold > 0:
                unlikely = cond.softmax(-1) < self.filter_threshold
                uncond = torch.where(unlikely, torch.maximum(uncond, cond), uncond)
            logits = torch.lerp(uncond, cond, self.scale)  # uncond + scale (cond - uncond)
        return (logits if log_weights is None else logits + log_weights).softmax(-1)
