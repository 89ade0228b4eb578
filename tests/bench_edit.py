"""Compares ways to edit images on held-out images whose hidden pixels are known.

    python tests/bench_edit.py MODEL DATA [--images 64]

MODEL is a folder that save_pretrained wrote. DATA has images train/CLASS/*.png and val/CLASS/*.png of the
model's size. The ways differ in when partly known patches are drawn, and in how their guiding pixels are drawn.
The naive way draws whole patches and pastes the known pixels over them. Random boxes and strokes are hidden.
Prints for each way

bits    bits per hidden dimension of the true image, in the unguided sampler's distributions; fewer is better
seam    mean absolute difference of drawn values and their known neighbours, divided by that in the true
        images; 1 is best
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.fractalgen import FractalGen
from models.noise import VALUES
from models.patches import patchify
from models.sampling.guidance import inverse_cdf
from models.sampling.known import KnownPixels
from util.inputs import to_value_batch


class ForcedBits:
    """A `pick` that makes an edit draw the true images, and adds up the bits of these draws.

    Hidden pixels and their guiding pixels get the true values. The uniforms encode them, as 2 plus the value.
    """

    def __init__(self, model, values, free, seed):
        """Values (B, C, H, H) of the true images. Where `free` (B, H, H), pixels are drawn from the model."""
        self.noise, self.bits = model.noise(seed, range(len(values))), 0.0
        for side, size in zip(self.noise.maps, model.img_size_list, strict=True):
            images = model.alphabet.normalize(values)
            means = (
                patchify(images, (size, size)).unflatten(2, (values.shape[1], size, size)).mean(-1).mean(-1)
            )  # (B, L, C)
            forced = (
                (2 + model.alphabet.to_values(means, dim=2)).transpose(1, 2).float().view_as(side[:, VALUES])
            )
            if size == 1:
                forced = torch.where(free[:, None], side[:, VALUES], forced)
            elif free.any():  # the guiding pixel of a patch with such pixels is drawn from the model too
                touched = (
                    patchify(free[:, None].float(), (size, size))
                    .amax(-1)
                    .view(len(values), 1, *side.shape[2:])
                )
                forced = torch.where(touched > 0, side[:, VALUES], forced)
            side[:, VALUES] = forced

    def __call__(self, probs, uniforms):
        forced = uniforms >= 2
        values = torch.where(forced, (uniforms - 2).long(), inverse_cdf(probs, uniforms.clamp(max=1 - 1e-7)))
        bits = -probs.double().gather(1, values[:, None])[:, 0].clamp(min=1e-30).log2()
        self.bits += bits[forced].sum().item()
        return values


def masks(n: int, side: int, seed: int) -> torch.Tensor:
    """Returns masks (n, side, side), bool: by turns a box of about a quarter and a thick stroke."""
    rng, out = np.random.default_rng(seed), np.zeros((n, side, side), bool)
    rows, columns = np.mgrid[:side, :side]
    for i in range(n):
        if i % 2:
            h, w = rng.integers(side // 3, 2 * side // 3, 2)
            y, x = rng.integers(0, side - h + 1), rng.integers(0, side - w + 1)
            out[i, y : y + h, x : x + w] = True
        else:
            a, b, c = rng.normal(size=2), rng.random(2) * side, side * rng.uniform(0.08, 0.2)
            out[i] = np.abs((rows - b[0]) * a[0] + (columns - b[1]) * a[1]) / np.hypot(*a) < c
    return torch.from_numpy(out)


def seam(values: torch.Tensor, hidden: torch.Tensor) -> float:
    """Returns the mean absolute difference of neighbours of which one is hidden and one is not.

    values (B, C, H, H); hidden (B, H, H), bool
    """
    total, count, x = 0.0, 0, values.double()
    for dim in (1, 2):
        edge = hidden.narrow(dim, 1, hidden.shape[dim] - 1) != hidden.narrow(dim, 0, hidden.shape[dim] - 1)
        step = (
            (x.narrow(dim + 1, 1, x.shape[dim + 1] - 1) - x.narrow(dim + 1, 0, x.shape[dim + 1] - 1))
            .abs()
            .mean(1)
        )
        total, count = total + step[edge].sum().item(), count + edge.sum().item()
    return total / count


def dilated(hidden: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Returns the mask, bool (B, H, H), of all patches of level 0 that have a hidden pixel."""
    whole = (
        patchify(hidden[:, None].float(), (patch_size,) * 2)
        .amax(-1)
        .view(len(hidden), *(hidden.shape[1] // patch_size,) * 2)
    )
    return whole.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2) > 0


def precedence(partly: float):
    """Returns a `KnownPixels.precedence` that decides when partly known patches are drawn.

    partly  -1 before the patches without known pixels, 0 among them, 1 after them
    """

    def of(self, patch_size):
        share = self.hidden_pixels(patch_size) / math.prod(patch_size)
        return torch.where(share == 0, -3.0, torch.where(share < 1, partly, 0.0))

    return of


def no_guide(self, channel, drawn):
    return None


def possible_only(self, channel, drawn):
    weights = GUIDE(self, channel, drawn)
    return torch.where(weights.isneginf(), weights, 0.0)


GUIDE = KnownPixels.guiding_weights


def measure(model, values, labels, hidden, seeds, naive=False):
    """Returns bits per hidden dimension and its standard deviation over seeds, and the same of the seam."""
    drawn_mask = dilated(hidden, model.img_size_list[1]) if naive else hidden
    known = KnownPixels(model.alphabet.normalize(values), drawn_mask, model.alphabet)
    cond = [model.class_emb(labels)] * model.num_conds
    bits, seams = [], []
    for seed in seeds:
        forced = ForcedBits(model, values, drawn_mask & ~hidden, seed)
        model.sample(
            cond, model.sampling_defaults.num_inference_steps, noise=forced.noise, pick=forced, known=known
        )
        bits.append(forced.bits / (model.alphabet.channels * hidden.sum().item()))
        noise = model.noise(seed, range(len(values)))
        out = model.alphabet.to_values(
            model.sample(cond, model.sampling_defaults.num_inference_steps, noise=noise, known=known)
        )
        out = torch.where(hidden[:, None], out, values.long())
        seams.append(seam(out, hidden) / seam(values, hidden))
    return np.mean(bits), np.std(bits), np.mean(seams), np.std(seams)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder that save_pretrained wrote")
    parser.add_argument("data", type=Path, help="a folder with train/CLASS and val/CLASS")
    parser.add_argument("--images", type=int, default=64, help="number of held-out images")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds to average over")
    parser.add_argument("--num_iter", type=int, nargs="+", help="steps of each level; default: the model's")
    args = parser.parse_args()
    model = FractalGen.from_pretrained(args.model)
    if args.num_iter:
        model.sampling_defaults = replace(model.sampling_defaults, num_inference_steps=tuple(args.num_iter))
    classes = sorted(path.name for path in (args.data / "train").iterdir())
    paths = sorted((args.data / "val").glob("*/*.png"))
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[: args.images]]
    values = to_value_batch([Image.open(path) for path in paths], model.image_shape, model.alphabet)
    labels = torch.tensor([classes.index(path.parent.name) for path in paths])
    hidden = masks(len(paths), values.shape[-1], seed=1)
    ways = {
        "partly known first, the most complete first (default)": (KnownPixels.precedence, GUIDE),
        "partly known first": (precedence(-1.0), GUIDE),
        "in random order with the others": (precedence(0.0), GUIDE),
        "partly known last": (precedence(1.0), GUIDE),
    }
    if model.generators[-1].spec.guiding_pixel:
        ways["guiding pixels drawn as if no pixel were known"] = (KnownPixels.precedence, no_guide)
        ways["guiding pixels drawn among the possible values"] = (KnownPixels.precedence, possible_only)
    for name, (order, guide) in ways.items():
        with (
            patch.object(KnownPixels, "precedence", order),
            patch.object(KnownPixels, "guiding_weights", guide),
        ):
            report(name, measure(model, values, labels, hidden, range(args.seeds)))
    report(
        "naive: whole patches drawn, known pixels pasted",
        measure(model, values, labels, hidden, range(args.seeds), naive=True),
    )


def report(name, figures):
    print("{:<54} bits {:.4f} (sd {:.4f})   seam {:.3f} (sd {:.3f})".format(name, *figures), flush=True)


if __name__ == "__main__":
    main()
