"""How best to edit: orders of partly known patches, guiding pixels of them, and the naive way, on held-out images.

    python tests/bench_edit.py MODEL DATA [--images 64]

MODEL: a folder of save_pretrained; DATA: images in val/CLASS/. For random boxes and strokes it prints, for each way,
bits    negative log2-likelihood a hidden sub-pixel of the true image, as the unguided sampler meets it (fewer is better)
seam    mean step in levels between drawn and known neighbours, over that of the true images there (1 is best)
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.fractalgen import FractalGen
from models.noise import COLOUR, Noise
from models.patches import patchify
from models.sampling.guidance import inverse_cdf
from models.sampling.known import KnownPixels
from util.pixels import normalize, to_values


class ForcedBits:
    """Teacher forcing of an edit: hidden pixels, and the guiding pixels above them, become the true ones; their bits are added
    up. Where `free` (B, H, H), pixels are drawn from the model."""

    def __init__(self, model, levels, free, seed):
        self.noise, self.bits = Noise.of_images(seed, range(len(levels)), model.noise_sizes), 0.0
        for side, size in zip(self.noise.maps, model.noise_sizes, strict=True):
            images = normalize(levels)
            means = patchify(images, size).unflatten(2, (3, size, size)).mean(-1).mean(-1)  # (B, L, 3)
            forced = (2 + to_values(means, dim=2)).transpose(1, 2).float().view_as(side[:, COLOUR])
            if size == 1:
                forced = torch.where(free[:, None], side[:, COLOUR], forced)
            elif free.any():  # a guiding pixel over pixels that are drawn is drawn
                touched = patchify(free[:, None].float(), size).amax(-1).view(len(levels), 1, *side.shape[2:])
                forced = torch.where(touched > 0, side[:, COLOUR], forced)
            side[:, COLOUR] = forced

    def __call__(self, probs, uniforms):
        forced = uniforms >= 2
        values = torch.where(forced, (uniforms - 2).long(), inverse_cdf(probs, uniforms.clamp(max=1 - 1e-7)))
        bits = -probs.double().gather(1, values[:, None])[:, 0].clamp(min=1e-30).log2()
        self.bits += bits[forced].sum().item()
        return values


def masks(n: int, side: int, seed: int) -> torch.Tensor:
    """Boxes of about a quarter of the image, and thick strokes, by turns: bool (n, side, side)."""
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


def seam(levels: torch.Tensor, hidden: torch.Tensor) -> float:
    """Mean absolute step, in levels, between neighbours of which one is hidden: (B, 3, H, H), (B, H, H)."""
    total, count, x = 0.0, 0, levels.double()
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
    """Whole patches of level 0 that have a hidden pixel."""
    whole = (
        patchify(hidden[:, None].float(), patch_size)
        .amax(-1)
        .view(len(hidden), *(hidden.shape[1] // patch_size,) * 2)
    )
    return whole.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2) > 0


def precedence(partly: float):
    """Partly known patches in random order among themselves, -1 before the others, 0 among them, 1 after them."""

    def of(self, patch_size):
        share = self.hidden_pixels(patch_size) / patch_size**2
        return torch.where(share == 0, -3.0, torch.where(share < 1, partly, 0.0))

    return of


def no_guide(self, channel, drawn):
    return None


def possible_only(self, channel, drawn):
    weights = GUIDE(self, channel, drawn)
    return torch.where(weights.isneginf(), weights, 0.0)


GUIDE = KnownPixels.guide_weights


def measure(model, levels, labels, hidden, seeds, naive=False):
    """Bits a hidden sub-pixel and seam."""
    drawn_mask = dilated(hidden, model.img_size_list[1]) if naive else hidden
    given = KnownPixels(normalize(levels), drawn_mask)
    cond = [model.class_emb(labels)] * model.num_conds
    bits, seams = [], []
    for seed in seeds:
        forced = ForcedBits(model, levels, drawn_mask & ~hidden, seed)
        model.sample(
            cond, model.sampling_defaults.num_inference_steps, noise=forced.noise, pick=forced, given=given
        )
        bits.append(forced.bits / (3 * hidden.sum().item()))
        noise = Noise.of_images(seed, range(len(levels)), model.noise_sizes)
        out = to_values(
            model.sample(cond, model.sampling_defaults.num_inference_steps, noise=noise, given=given)
        )
        out = torch.where(hidden[:, None], out, levels.long())
        seams.append(seam(out, hidden) / seam(levels, hidden))
    return np.mean(bits), np.std(bits), np.mean(seams), np.std(seams)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_iter", type=int, nargs="+", help="steps of each level; default: the model's")
    args = parser.parse_args()
    model = FractalGen.from_pretrained(args.model)
    if args.num_iter:
        model.sampling_defaults = replace(model.sampling_defaults, num_inference_steps=tuple(args.num_iter))
    classes = sorted(path.name for path in (args.data / "train").iterdir())
    paths = sorted((args.data / "val").glob("*/*.png"))
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[: args.images]]
    levels = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(p).convert("RGB")).copy()).permute(2, 0, 1) for p in paths]
    )
    labels = torch.tensor([classes.index(path.parent.name) for path in paths])
    hidden = masks(len(paths), levels.shape[-1], seed=1)
    ways = {
        "partly known first, rather the most known (as it is)": (KnownPixels.precedence, GUIDE),
        "partly known first": (precedence(-1.0), GUIDE),
        "in random order with the others": (precedence(0.0), GUIDE),
        "partly known last": (precedence(1.0), GUIDE),
    }
    if model.generators[-1].spec.guiding_pixel:
        ways["guiding pixel drawn as if nothing were known"] = (KnownPixels.precedence, no_guide)
        ways["guiding pixel within what is possible"] = (KnownPixels.precedence, possible_only)
    for name, (order, guide) in ways.items():
        with (
            patch.object(KnownPixels, "precedence", order),
            patch.object(KnownPixels, "guide_weights", guide),
        ):
            report(name, measure(model, levels, labels, hidden, range(args.seeds)))
    report(
        "naive: whole patches, known pixels pasted",
        measure(model, levels, labels, hidden, range(args.seeds), naive=True),
    )


def report(name, figures):
    print("{:<54} bits {:.4f} (sd {:.4f})   seam {:.3f} (sd {:.3f})".format(name, *figures), flush=True)


if __name__ == "__main__":
    main()
