"""The recursion: a generator whose patches are made by a generator (paper, 3.2 and 4.1).

*Fractal Generative Models*, arXiv 2502.17437. Letters: B images, N images of a level, C channels, S an
image's sides and p a patch's sides (one number for each axis), K conditions, D width, R rows (the patches
that the next level gets).
"""

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from models import ar, mar  # noqa: F401  importing them registers their types
from models.generator import GENERATORS, ForwardOptions, Generator, LevelSpec, Mask, Steps
from models.hub.presets import ADAPTED, PRESETS, check_architecture, find_preset
from models.hub.pretrained import Pretrained, recorded
from models.likelihood.codec.compress import compress, decompress
from models.likelihood.log_likelihood import classify, log_likelihood
from models.noise import Noise
from models.patches import Shape, as_shapes
from models.pixelloss import LossTerm, PixelLoss
from models.sampling.edit import edit, edit_class, outpaint, uncrop
from models.sampling.generate import generate, sample
from models.sampling.options import SamplingOptions
from util.pixels import Alphabet


class FractalGen(nn.Module, Pretrained):
    """A fractal generative model (paper, 3.1 and 4.1), or one of its inner levels.

    The lists have one entry for each level, the head last: `img_size_list[i]` is the size of the images that
    level i sees and `img_size_list[i + 1]` that of its patches; the last size is 1. A size is an integer (a
    square, as published) or has one number for each of one to three axes, see `as_shapes`.
    `generator_type_list` names registered generators; its last entry, the head, is "ar" (docs/format.md,
    "Presets"). `shapes` are the sizes with a number for each axis.

    label_drop_prob             probability with which training replaces an image's class by `fake_latent`
    class_num                   number of classes; 0: the model is unconditional
    attn_dropout, proj_dropout  dropout probabilities (docs/format.md, "AR levels" and "MAR levels")
    guiding_pixel               whether MAR levels below level 0 have a guiding pixel
    num_conds                   number of conditions that a MAR level uses, from 1 to 1 + 2 * axes
    r_weight                    weight of the first channel (R) in the training loss, where others have 1
    grad_checkpointing          computes activations again in the backward pass, to save memory
    fractal_level               number of this level; users leave it at 0
    channels … std              what a cell of an image holds, see `Alphabet`; of categorical values there is
                                no mean, and so no guiding pixel

    Raises ValueError for an architecture that cannot work.
    """

    def __init__(
        self,
        img_size_list: Sequence[int | Sequence[int]],
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
        channels: int = 3,
        num_values: int = 256,
        value_kind: str = "ordinal",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.arguments = recorded(locals())
        self.alphabet = Alphabet(channels, num_values, value_kind, mean, std)
        check_architecture(
            img_size_list, embed_dim_list, num_blocks_list, num_heads_list, generator_type_list, num_conds,
            guiding_pixel, self.alphabet,
        )  # fmt: skip
        level, self.fractal_level = fractal_level, fractal_level
        self.img_size_list, self.num_conds = tuple(img_size_list), num_conds
        self.shapes = as_shapes(img_size_list)
        self.sampling_defaults = SamplingOptions.of_sizes(self.shapes)
        if level == 0:
            self.label_drop_prob = label_drop_prob
            self.class_emb = nn.Embedding(class_num, embed_dim_list[0])
            # DDP would wait for the gradient of an embedding that is not used.
            self.class_emb.requires_grad_(bool(class_num > 0))
            self.fake_latent = nn.Parameter(torch.empty(1, embed_dim_list[0]))
            for weight in (self.class_emb.weight, self.fake_latent):
                nn.init.normal_(weight, std=0.02)
        spec = LevelSpec(
            index=level,
            alphabet=self.alphabet,
            img_size=self.shapes[level],
            patch_size=self.shapes[level + 1],
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
                embed_dim_list[level], embed_dim_list[-1], num_blocks_list[-1], num_heads_list[-1], r_weight,
                self.alphabet,
            )  # fmt: skip
        else:
            self.next_fractal = FractalGen(**self.arguments, fractal_level=level + 1)

    @property
    def class_num(self) -> int:
        """The number of classes, which is that of `class_emb`. models/hub/finetune.py changes it."""
        return self.class_emb.num_embeddings

    @property
    def generators(self) -> list[Generator]:
        """The generators of this level and of the levels below it, without the head."""
        below = [] if isinstance(self.next_fractal, PixelLoss) else self.next_fractal.generators
        return [self.generator, *below]

    @property
    def image_shape(self) -> Shape:
        """The cells of an image of level 0 along each axis."""
        return self.shapes[0]

    @property
    def num_dims(self) -> int:
        """The number of values of an image, over which bits per dimension are a mean."""
        return self.alphabet.channels * prod(self.image_shape)

    def noise(self, seed: int | Sequence[int], indices: Sequence[int], device=None) -> Noise:
        """The random numbers of the images `indices` of `seed`, from this level down (`Noise.of_images`)."""
        return Noise.of_images(
            seed, indices, self.shapes[self.fractal_level :], device, self.alphabet.channels
        )

    def forward(
        self,
        imgs: Tensor,
        labels: Tensor,
        *,
        masks: Sequence[Mask | Steps | None] | None = None,
        label_drop: Tensor | None = None,
        train: bool | None = None,
        dither: float = 0.01,
        round_guiding_pixel: bool = False,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, list[LossTerm]]:
        """Computes the loss (F3), a scalar; with `return_terms` returns its terms too.

        imgs        (B, C, *S), normalised by `alphabet`
        labels      (B,) int64, from 0 to class_num - 1; without classes they are ignored
        train       masks and channel weights are as in training (True) or as in evaluation; default:
                    `self.training`
        masks       one for each level above the pixel, None where it has none; default: drawn. See
                    `ForwardOptions`
        label_drop  (B,) bool, the images whose class is hidden; default: random in training, all in
                    evaluation, so that the evaluation loss is unconditional (docs/format.md, "Class
                    conditions and levels")
        dither, round_guiding_pixel  see `ForwardOptions`
        """
        train = self.training if train is None else train
        if label_drop is None:
            drop_prob = self.label_drop_prob if train else 1.0
            label_drop = torch.rand(len(imgs), device=imgs.device) < drop_prob
        options = ForwardOptions(masks, train, dither, round_guiding_pixel)
        terms = self.loss_terms(imgs, self.conditions(labels, label_drop), options)
        loss = torch.stack([term.loss for term in terms]).sum()
        return (loss, terms) if return_terms else loss

    def loss_terms(self, images: Tensor, conds: Sequence[Tensor], options: ForwardOptions) -> list[LossTerm]:
        """Computes the terms of the loss (F3) breadth-first, one level after the other (paper, 4.1).

        The generator turns normalised images (N, C, *S) into patches (R, C, *p), and their conditions, each
        (N, cond_dim), into conditions of the patches. The next fractal does the same with these, until the
        patches are pixels.
        """
        output = self.generator(images, conds, options)
        return output.terms + self.next_fractal.loss_terms(output.images, output.conds, options)

    def conditions(self, labels: Tensor, label_drop: Tensor) -> list[Tensor]:
        """Makes the K conditions of level 0, each (B, D) (docs/format.md, "Class conditions and levels").

        `labels` are (B,) int64; where `label_drop` (B,) bool is true, the condition is `fake_latent`. In a
        model without classes (`class_num` 0) it is `fake_latent` everywhere.
        """
        if self.class_num == 0:
            return [self.fake_latent.repeat(len(labels), 1)] * self.num_conds
        cond = torch.where(label_drop[:, None], self.fake_latent, self.class_emb(labels))
        return [cond] * self.num_conds

    def draw_masks(self, noise: Noise, train: bool = False) -> list[Mask | None]:
        """Draws a mask for each level, None for an AR level (docs/format.md, "MAR levels").

        `noise`, on the host, holds the random numbers of the images. The masks of an image depend on them
        alone.
        """
        masks = []
        for generator in self.generators:
            mask = generator.draw_mask(noise, train)
            masks.append(mask)
            noise = noise.rows(mask.rows if mask is not None else torch.arange(noise.order_uniforms.numel()))
        return masks

    sample, generate = sample, generate
    edit, outpaint, uncrop, edit_class = edit, outpaint, uncrop, edit_class
    log_likelihood, classify = log_likelihood, classify
    compress, decompress = compress, decompress


def build(
    name: str, *, guiding_pixel: bool | None = None, num_conds: int | None = None, **others
) -> FractalGen:
    """Builds the model `name` of PRESETS (docs/format.md, "Presets") with random weights.

    `others` are arguments of FractalGen. Among them img_size_list and those of the alphabet adapt the
    architecture to other data, see `find_preset`. For the rest the name decides it: an unknown name, or a
    guiding_pixel or num_conds that contradicts it, raises ValueError.
    """
    data = {key: others.pop(key) for key in ADAPTED if key in others}
    preset = find_preset(name, guiding_pixel=guiding_pixel, num_conds=num_conds, **data)
    model = FractalGen(**preset.arguments, **others)
    model.sampling_defaults = preset.sampling_defaults
    return model


# Published scripts call fractalgen.fractalmar_in64(...) (docs/format.md, "Published names and flags").
globals().update({name: partial(build, name) for name in PRESETS})
