"""The recursion: a generator whose patches are made by a generator, down to one pixel. And the table of models.

Fractal Generative Models, arXiv 2502.17437.
Letters: B images, N rows at a level, H image side, K conditions, D width, R rows that go down, h halves (1 or 2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from models import ar, mar  # noqa: F401  importing ar registers its type
from models.generator import GENERATORS, ForwardOptions, Generator, LevelSpec, Mask, Steps, check_architecture
from models.hub.pretrained import Pretrained, recorded
from models.layers import full_precision
from models.likelihood.log_likelihood import classify, log_likelihood
from models.noise import Noise
from models.pixelloss import PixelLoss
from models.sampling.canvas import LevelSampler, draw_hidden
from models.sampling.edit import edit, edit_class, outpaint, uncrop
from models.sampling.generate import SamplingDefaults, eval_mode, generate, validate_num_iters
from models.sampling.guidance import Guidance, inverse_cdf
from models.sampling.known import KnownPixels
from models.sampling.prepare import Setup
from util.pixels import NotebookCanvas

GUIDING_R_WEIGHT = 5.0


@dataclass(frozen=True)
class Term:
    """One term of the loss, from one softmax head: nll (R, 3), nats of R, G, B of its rows, and their weighted mean."""

    name: str
    nll: Tensor
    loss: Tensor

    @classmethod
    def of(cls, name: str, nll: Tensor, r_weight: float) -> "Term":
        """`r_weight` is R's weight against 1 for G and B; the mean divides by their sum (SPEC section 4)."""
        red, green, blue = nll.mean(0)
        return cls(name, nll, (r_weight * red + green + blue) / (r_weight + 2))


class FractalGen(nn.Module, Pretrained):
    """A fractal generative model, or one of its inner levels.

    Lists have one entry for each level, the RGB head last: `img_size_list[i]` is the image side that level i sees and
    `img_size_list[i + 1]` its patch side; the last size is 1. `generator_type_list` names registered generators; its
    last entry, the RGB head, is "ar". Raises ValueError for what cannot work.
    """

    def __init__(
        self,
        img_size_list: Sequence[int],
        embed_dim_list: Sequence[int],
        num_blocks_list: Sequence[int],
        num_heads_list: Sequence[int],
        generator_type_list: Sequence[str],
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        guiding_pixel: bool = False,
        num_conds: int = 1,
        r_weight: float = 1.0,
        grad_checkpointing: bool = False,
        fractal_level: int = 0,
    ):
        super().__init__()
        self.arguments = recorded(locals())
        check_architecture(
            img_size_list, embed_dim_list, num_blocks_list, num_heads_list, generator_type_list, num_conds
        )
        level, self.fractal_level = fractal_level, fractal_level
        self.img_size_list = tuple(img_size_list)
        self.num_conds, self.r_weight = num_conds, r_weight
        self.sampling_defaults = SamplingDefaults.of_sizes(img_size_list)
        if level == 0:
            self.class_num, self.label_drop_prob = class_num, label_drop_prob
            self.class_emb = nn.Embedding(class_num, embed_dim_list[0])
            self.class_emb.requires_grad_(
                bool(class_num > 0)
            )  # DDP waits for the gradient of every weight that wants one
            self.fake_latent = nn.Parameter(torch.empty(1, embed_dim_list[0]))
            for weight in (self.class_emb.weight, self.fake_latent):
                nn.init.normal_(weight, std=0.02)
        spec = LevelSpec(
            index=level,
            img_size=img_size_list[level],
            patch_size=img_size_list[level + 1],
            embed_dim=embed_dim_list[level],
            num_blocks=num_blocks_list[level],
            num_heads=num_heads_list[level],
            cond_dim=embed_dim_list[max(level - 1, 0)],
            num_conds=num_conds,
            guiding_pixel=guiding_pixel and level > 0,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
            grad_checkpointing=grad_checkpointing,
        )
        self.generator: Generator = GENERATORS[generator_type_list[level]](spec)
        if level + 2 == len(img_size_list):
            self.next_fractal = PixelLoss(
                embed_dim_list[level], embed_dim_list[-1], num_blocks_list[-1], num_heads_list[-1]
            )
        else:
            self.next_fractal = FractalGen(
                img_size_list, embed_dim_list, num_blocks_list, num_heads_list, generator_type_list,
                attn_dropout=attn_dropout, proj_dropout=proj_dropout, guiding_pixel=guiding_pixel,
                num_conds=num_conds, r_weight=r_weight, grad_checkpointing=grad_checkpointing,
                fractal_level=level + 1,
            )  # fmt: skip

    @property
    def generators(self) -> list[Generator]:
        """This level's generator and those below, the RGB head left out."""
        below = [] if isinstance(self.next_fractal, PixelLoss) else self.next_fractal.generators
        return [self.generator, *below]

    def terms(self, images: Tensor, conds: Sequence[Tensor], choices: ForwardOptions) -> list[Term]:
        """Breadth-first: normalised images (N, 3, H, H), conditions, each (N, cond_dim) -> the terms of the loss."""
        handed = self.generator(images, conds, choices)
        terms = []
        if handed.guiding_nll is not None:
            weight = GUIDING_R_WEIGHT if choices.train else 1.0
            terms.append(Term.of(f"guiding{self.fractal_level}", handed.guiding_nll, weight))
        if isinstance(self.next_fractal, PixelLoss):
            pixels = handed.images.flatten(1)  # (R, 3)
            nll = self.next_fractal(pixels, handed.conds)
            return [*terms, Term.of("rgb", nll, self.r_weight if choices.train else 1.0)]
        return terms + self.next_fractal.terms(handed.images, handed.conds, choices)

    def conditions(self, labels: Tensor, label_drop: Tensor) -> list[Tensor]:
        """Class labels (B,) int64 and which of them are dropped (B,) bool -> level 0's conditions, each (B, D).

        Without classes (`class_num` 0) the condition is always `fake_latent`.
        """
        if self.class_num == 0:
            return [self.fake_latent.repeat(len(labels), 1)] * self.num_conds
        cond = torch.where(label_drop[:, None], self.fake_latent, self.class_emb(labels))
        return [cond] * self.num_conds

    def forward(
        self,
        imgs: Tensor,
        labels: Tensor,
        *,
        masks: Sequence[Mask | Steps | None] | None = None,
        label_drop: Tensor | None = None,
        train: bool | None = None,
        dither: float = 0.01,
        as_drawn: bool = False,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, list[Term]]:
        """Normalised images (B, 3, H, H), class labels (B,) int64 -> scalar loss; with `return_terms` its terms too.

        train       masks and channel weights as in training or as in evaluation; default: `self.training`
        masks       one for each level above the pixel, None where it has none; default: drawn; or Steps, see `ForwardOptions`
        label_drop  (B,) bool, images whose class is hidden; default: random in training, all in evaluation,
                    so that the evaluation loss is unconditional (SPEC section 3)
        dither, as_drawn  see `ForwardOptions`
        """
        train = self.training if train is None else train
        if label_drop is None:
            drop_prob = self.label_drop_prob if train else 1.0
            label_drop = torch.rand(len(imgs), device=imgs.device) < drop_prob
        terms = self.terms(
            imgs, self.conditions(labels, label_drop), ForwardOptions(masks, train, dither, as_drawn)
        )
        loss = torch.stack([term.loss for term in terms]).sum()
        return (loss, terms) if return_terms else loss

    def draw_masks(self, noise: Noise, train: bool = False) -> list[Mask | None]:
        """The masks of all levels for the images of `noise` (on the host), a function of each image alone."""
        masks = []
        for generator in self.generators:
            mask = generator.draw_mask(noise, train)
            masks.append(mask)
            noise = noise.rows(mask.rows if mask is not None else torch.arange(noise.order.numel()))
        return masks

    def sampler(self, setup: Setup) -> LevelSampler:
        """This level's sampler, for one sampling call."""
        return self.generator.sampler(self.next_fractal.sampler(setup), setup)

    @torch.no_grad()
    def sample(
        self,
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
        chunk: int | None = None,
        compiled: bool = False,
        refresh: int = 1,
        pick: Callable[[Tensor, Tensor], Tensor] = inverse_cdf,
        on_step: Callable[[int, int, Tensor], None] | None = None,
        watch_levels: int = 1,
        given: KnownPixels | None = None,
    ) -> Tensor:
        """Conditions -> normalised images (B, 3, H, H). The published call; `generate` is the convenient one.

        cond_list        num_conds of (B, D), or with cfg != 1 of (2 B, D): class conditions, then `fake_latent`
        num_iter_list    steps of each level above the pixel (an AR level takes one step a patch whatever it says)
        cfg … filter_threshold, pick   see `Guidance`; cfg and temperature may be lists, a number for each level above the pixel
        fractal_level    the level of this module
        visualize        show the growing canvas in a notebook
        noise            the images' randomness; default: a seed from torch's global generator
        chunk            at most so many patches of each deeper level are drawn together: bounds memory, changes only rounding
        compiled         run torch.compile on what is called most
        refresh          above 1, approximate: a MAR level 0 computes all features every `refresh` steps only (models/sampling/feature_cache.py)
        on_step          called with (step, number of steps, canvas (B, 3, H, H)) after each step of level 0
        watch_levels     above 1, on_step also sees the canvas within a step, after each step of so many levels
        given            what is known of the images; see models/sampling/edit.py
        """
        if fractal_level != self.fractal_level:
            raise ValueError(
                f"fractal_level {fractal_level} given to the module of level {self.fractal_level}"
            )
        guidance = Guidance.create(
            cfg, cfg_schedule, temperature, filter_threshold, pick, len(self.generators)
        )
        validate_num_iters(num_iter_list, len(self.generators))
        rows = len(cond_list[0])
        if len(cond_list) < self.num_conds or (guidance.doubled and rows % 2):
            raise ValueError(
                f"cond_list must hold {self.num_conds} conditions, with cfg != 1 of an even number of rows; "
                f"got {len(cond_list)} of {rows} rows"
            )
        if refresh < 1 or (refresh > 1 and not isinstance(self.generator, mar.MAR)):
            raise ValueError(f"refresh {refresh} must be 1, or above 1 for a model whose level 0 is a mar")
        if noise is None:
            seed = int(torch.randint(2**63 - 1, ()))
            n = rows // 2 if guidance.doubled else rows
            noise = Noise.of_images(seed, range(n), self.noise_sizes, cond_list[0].device)
        if visualize:
            on_step = NotebookCanvas(then=on_step)
        if given is not None and not given.hidden.any():
            return given.images.clone()
        device, dtype = cond_list[0].device.type, self.generator.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with eval_mode(self), full_precision(cond_list[0]), torch.inference_mode():
            sampler = self.sampler(Setup(dtype, chunk, compiled, refresh, watch_levels))
            images = draw_hidden(sampler, cond_list, guidance, noise, num_iter_list, given, on_step)
        return images.clone()  # an ordinary tensor

    @property
    def noise_sizes(self) -> tuple[int, ...]:
        """Image sides from this level down, for `Noise.of_images`."""
        return self.img_size_list[self.fractal_level :]

    generate, edit, outpaint, uncrop, edit_class = generate, edit, outpaint, uncrop, edit_class
    log_likelihood, classify = log_likelihood, classify


@dataclass(frozen=True)
class Preset:
    """A named architecture (SPEC section 1) and its best published sampling settings (or ours, for small models)."""

    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    generators: tuple[str, ...]
    num_conds: int
    guiding_pixel: bool
    steps: tuple[int, ...]
    guidance_scale: float
    temperature: float


_AR3, _MAR3, _MAR4 = ("ar",) * 3, ("mar", "mar", "ar"), ("mar", "mar", "mar", "ar")
_IN64, _IN256 = (64, 4, 1), (256, 16, 4, 1)
PRESETS = {
    # sizes, widths, blocks, heads, generators, conditions, guiding pixel, steps, guidance scale, temperature
    "fractalar_in64": Preset(_IN64, (1024, 512, 128), (32, 8, 3), (16, 8, 4), _AR3, 1, False, (64, 16), 11.0, 1.03),
    "fractalmar_in64": Preset(_IN64, (1024, 512, 128), (32, 8, 3), (16, 8, 4), _MAR3, 5, False, (64, 16), 6.5, 1.02),
    "fractalmar_base_in256": Preset(
        _IN256, (768, 384, 192, 64), (24, 6, 3, 1), (12, 6, 3, 4), _MAR4, 5, True, (64, 16, 16), 29.0, 1.1),
    "fractalmar_large_in256": Preset(
        _IN256, (1024, 512, 256, 64), (32, 8, 4, 1), (16, 8, 4, 4), _MAR4, 5, True, (64, 16, 16), 21.0, 1.1),
    "fractalmar_huge_in256": Preset(
        _IN256, (1280, 640, 320, 64), (40, 10, 5, 1), (16, 8, 4, 4), _MAR4, 5, True, (64, 16, 16), 19.0, 1.1),
    "fractalmar_tiny_in8": Preset((8, 4, 1), (96, 64, 32), (1, 2, 1), (4, 4, 2), _MAR3, 5, False, (4, 16), 4.0, 1.2),
    "fractalar_tiny_in8": Preset((8, 4, 1), (96, 64, 32), (1, 2, 1), (4, 4, 2), _AR3, 1, False, (4, 16), 4.0, 1.2),
    "fractalmar_tiny_in32": Preset((32, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _MAR3, 5, False, (32, 16), 3.0, 1.0),
    "fractalmar_tiny_guided_in32": Preset(
        (32, 4, 1), (256, 128, 64), (5, 2, 1), (8, 4, 4), _MAR3, 5, True, (48, 16), 1.5, 1.7),
    "fractalar_tiny_in32": Preset((32, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _AR3, 1, False, (64, 16), 3.0, 1.0),
    "fractalmar_tiny_in64": Preset(
        (64, 8, 2, 1), (256, 128, 64, 64), (6, 3, 2, 1), (8, 4, 4, 4), _MAR4, 5, True, (32, 16, 4), 3.0, 1.0),
    "fractalar_tiny_in64": Preset((64, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _AR3, 1, False, (64, 16), 3.0, 1.0),
}  # fmt: skip


def build(
    name: str, *, guiding_pixel: bool | None = None, num_conds: int | None = None, **training
) -> FractalGen:
    """The model `name` of PRESETS. `training` takes FractalGen's class_num, label_drop_prob, dropouts, r_weight and
    grad_checkpointing. The architecture is the name's: a contradictory guiding_pixel or num_conds raises ValueError."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    for setting, given in (("guiding_pixel", guiding_pixel), ("num_conds", num_conds)):
        fixed = getattr(preset, setting)
        if given is not None and given != fixed:
            raise ValueError(f"{setting} {given} contradicts model {name}, which has {setting} {fixed}")
    model = FractalGen(
        preset.sizes, preset.widths, preset.blocks, preset.heads, preset.generators,
        guiding_pixel=preset.guiding_pixel, num_conds=preset.num_conds, **training,
    )  # fmt: skip
    model.sampling_defaults = replace(
        model.sampling_defaults,
        num_inference_steps=preset.steps, guidance_scale=preset.guidance_scale, temperature=preset.temperature,
    )  # fmt: skip
    return model


globals().update(
    {name: partial(build, name) for name in PRESETS}
)  # fractalgen.fractalmar_in64(...), as published
