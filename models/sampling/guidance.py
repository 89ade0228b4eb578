"""Classifier-free guidance of a 256-way softmax: scale, schedule, filter, draw (SPEC section 5).

Letters: N rows; logits are float32. A doubled batch holds the class-conditional rows, then the unconditional ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SCHEDULES = ("linear", "constant")


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One draw a row: probabilities (N, 256), uniforms (N,) in [0, 1) -> values (N,) int64; never one of probability 0."""
    cdf = probs.cumsum(-1)
    threshold = uniforms[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


@dataclass(frozen=True)
class Guidance:
    """How logits become draws.

    scale             guidance scale w >= 1: uncond + w (cond - uncond); 1 means no guidance and no second half
    schedule          "linear": 1 + (scale - 1) * progress at level 0; "constant": scale
    temperature       multiplies the logits, above 1 is sharper
    filter_threshold  where the conditional probability is below it, the unconditional logit is lifted
    pick              (probs (N, 256), uniforms (N,)) -> (N,) int64
    heads             where scales or temperatures differ: what holds for the softmax below each level, the RGB head last
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
        """Checks the settings, each with a ValueError that names it, and decides once whether the batch is doubled.

        `scale` and `temperature` are numbers, or lists of one number for each of `num_levels`.
        """
        lists = {"guidance scale": scale, "temperature": temperature}
        for name, values in lists.items():
            lists[name] = list(values) if isinstance(values, Sequence) else [values] * num_levels
            if len(lists[name]) != num_levels:
                raise ValueError(
                    f"{name} {values} must be one number, or {num_levels}, one for each level above the pixel"
                )
        heads = [
            cls._of_head(*both, schedule, filter_threshold, pick)
            for both in zip(*lists.values(), strict=True)
        ]
        doubled = any(head.scale != 1 for head in heads)
        heads = tuple(replace(head, doubled=doubled) for head in heads)
        return heads[-1] if len(set(heads)) == 1 else replace(heads[-1], heads=heads)

    @classmethod
    def _of_head(cls, scale, temperature, schedule, filter_threshold, pick) -> "Guidance":
        if not 1 <= scale < math.inf:
            raise ValueError(
                f"guidance scale (cfg) {scale} must be from 1, which turns guidance off, and finite"
            )
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown guidance schedule {schedule!r}; one of {', '.join(SCHEDULES)}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature} must be above 0, and finite")
        if not 0 <= filter_threshold <= 1:
            raise ValueError(f"filter_threshold {filter_threshold} must be from 0 to 1")
        return cls(scale, schedule, temperature, filter_threshold, pick)

    def head(self, level: int) -> "Guidance":
        """Of the softmax below `level`: that of the next level's guiding pixel, or the RGB head."""
        return self.heads[level] if self.heads else self

    def at(self, progress: float) -> "Guidance":
        """The guidance of a step of level 0 with that share of its patches known."""
        if self.schedule == "constant":
            return self
        heads = tuple(head.at(progress) for head in self.heads)
        return replace(self, scale=1 + (self.scale - 1) * progress, heads=heads)

    def on(self, device: torch.device) -> "Guidance":
        """With the scale in a tensor there: what is compiled for one scale fits all."""
        heads = tuple(head.on(device) for head in self.heads)
        return replace(self, scale=torch.full((), float(self.scale), device=device), heads=heads)

    def double(self, x: Tensor) -> Tensor:
        """Rows that both halves share, once for each half."""
        return torch.cat([x, x]) if self.doubled else x

    def part(self, x: Tensor, rows: slice | Tensor) -> Tensor:
        """Those `rows` of each half."""
        return x.unflatten(0, (2, -1))[:, rows].flatten(0, 1) if self.doubled else x[rows]

    def probabilities(self, logits: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Logits (2N or N, 256) -> probabilities (N, 256), multiplied by exp(log_weights) (N, 256). What a row's constant
        does not change is left out."""
        if self.temperature != 1:
            logits = logits * self.temperature
        if self.doubled:
            if self.filter_threshold > 0:
                logits = logits - logits.amax(
                    -1, keepdim=True
                )  # SPEC section 5 lifts by the difference of the maxima
            cond, uncond = logits.chunk(2)
            if self.filter_threshold > 0:
                unlikely = cond.softmax(-1) < self.filter_threshold
                uncond = torch.where(unlikely, torch.maximum(uncond, cond), uncond)
            logits = torch.lerp(uncond, cond, self.scale)  # uncond + scale (cond - uncond)
        return (logits if log_weights is None else logits + log_weights).softmax(-1)
