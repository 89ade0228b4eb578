"""The sampler as a codec: its picks are the true values, or come from an entropy decoder (docs/codec.md).

To compress and to decompress, the same calls run on tensors of the same shapes, and so see the same
probabilities. A row of a pass depends on its own tile alone; rows that no image needs draw zeros.

Letters: C channels, V values, S the sides of `Tiles.canvas`, s those of a tile (the model's images), R rows
of a pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from models.likelihood.codec.archive import Header
from models.likelihood.codec.tiles import Tiles
from models.noise import VALUES, Noise
from models.patches import patchify
from models.sampling.generate import sample_images
from models.sampling.options import SamplingOptions
from util.errors import UserError

PHASE = 2**59  # more than the number of any tile of a phase


@dataclass
class CodedImage:
    """An image on its way through the passes.

    canvas  (C, *S) values: all to compress, and those so far to decompress
    values  the part of the canvas that the image is
    label   its class, or None
    coder   an AnsCoder, a stack: what is encoded last is decoded first
    """

    canvas: np.ndarray
    values: np.ndarray
    label: int | None
    coder: object

    @property
    def stack(self) -> bytes:
        """What is on the coder's stack, little-endian, without zero bytes at its end."""
        return self.coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")

    @property
    def has_ended(self) -> bool:
        """Whether more was decoded than the stack held: not even the 32 bits of the CRC are left."""
        return self.coder.num_valid_bits() < 32


class Passes:
    """Sends the tiles of images through a model, as a header says.

    Raises UserError if constriction is not installed.
    """

    def __init__(self, model, header: Header):
        try:
            import constriction
        except ImportError as error:
            raise UserError("compression needs constriction; pip install constriction") from error
        self.model, self.header = model, header
        self.tiles = Tiles(header.shape[1:], model.image_shape)
        self.known = lru_cache(1)(self.tiles.known)
        self.coder = constriction.stream.stack.AnsCoder
        # It rounds probabilities to multiples of 2^-24, but none of them to 0.
        self.rounded = constriction.stream.model.Categorical(perfect=False)

    def image(self, label: int | None, stack: bytes) -> CodedImage:
        """An image of zeros, and a coder with this stack. Raises UserError for a class that is none."""
        if label is not None and label >= self.model.class_num:
            raise UserError(f"the archive has class {label}, but the model {self.model.class_num} classes")
        canvas = np.zeros((self.header.shape[0], *self.tiles.canvas), self.model.alphabet.stored)
        values = canvas[(slice(None), *map(slice, self.header.shape[1:]))]
        # The last word of a stack is not 0.
        words = np.trim_zeros(np.frombuffer(stack + bytes(-len(stack) % 4), "<u4"), "b").astype(np.uint32)
        return CodedImage(canvas, values, label, self.coder(*[words] * bool(len(words))))

    def run(
        self, phase: int, number: int, images: Mapping[int, CodedImage], decode: bool
    ) -> list[CodedImage]:
        """Runs one pass, for the `images` by their index; those whose stream has ended are left out.

        It encodes the tiles, or decodes them to the canvases. Returns the images that it ran for.
        """
        model, tiles, rows, count = self.model, self.tiles, self.header.rows, self.tiles.count(phase)
        first, device = number * rows, model.fake_latent.device
        numbers = ((row, *divmod(first + row, count)) for row in range(rows))
        boxes = [
            (row, images[index], tiles.box(phase, tile))
            for row, index, tile in numbers
            if index in images and not images[index].has_ended
        ]
        if not boxes:
            return []
        values = np.zeros((rows, model.alphabet.channels, *tiles.sides), np.int32)
        known, cond = np.ones((rows, *tiles.sides), bool), model.fake_latent.repeat(rows, 1)
        for row, image, box in boxes:
            values[row], known[row] = image.canvas[(slice(None), *box)], self.known(phase)[box]
            if image.label is not None:
                cond[row] = model.class_emb.weight[image.label]
        noise = model.noise(self.header.seed, range(PHASE * phase + first, PHASE * phase + first + rows))
        write_values(model, noise, torch.from_numpy(values), torch.from_numpy(known))
        drawn = []

        def pick(probs: Tensor, uniforms: Tensor) -> Tensor:
            written = uniforms.double().cpu().numpy()  # sync
            picked, table = (np.abs(written) * probs.shape[1]).astype(np.int32), probs.float().cpu().numpy()
            if not np.isfinite(table).all():
                raise UserError("the model's probabilities are not finite; load other weights")
            size = len(written) // rows  # the pixels of each tile that are drawn together
            for row, image, _ in boxes:
                places = row * size + np.flatnonzero(written[row * size : (row + 1) * size] > 0)
                if decode:
                    picked[places] = image.coder.decode(self.rounded, table[places])
                else:
                    drawn.append((image.coder, picked[places], table[places]))
            return torch.from_numpy(picked).long().to(probs.device)

        noise = Noise([numbers.to(device) for numbers in noise.maps])
        options = SamplingOptions(self.header.steps, amp="off")
        found = sample_images(model, [cond] * model.num_conds, options, noise, pick)
        for coder, symbols, table in reversed(drawn):
            coder.encode_reverse(symbols, self.rounded, table)
        found = np.moveaxis(model.alphabet.to_numpy(found), -1, 1)
        for row, image, box in boxes:
            image.canvas[(slice(None), *box)] = found[row]
        return [image for _, image, _ in boxes]


def write_values(model, noise: Noise, tiles: Tensor, known: Tensor) -> None:
    """Writes what a pass shall draw in place of its random numbers: (value + 0.5) / V, negative where known.

    Values of tiles (R, C, *s), and `known` (R, *s) bool, the cells that no stream holds. A guiding pixel is
    the mean of its patch (docs/format.md, "MAR levels"), and known where all of its patch is.
    """
    alphabet = model.alphabet
    images = alphabet.normalize(tiles)
    for numbers, sides in zip(noise.maps, model.shapes, strict=True):
        mean = patchify(images, sides).unflatten(2, (alphabet.channels, *sides))  # (R, L, C, *p)
        for _ in sides:
            mean = mean.mean(-1)
        written = (alphabet.to_values(mean, dim=2) + 0.5) / alphabet.num_values
        written = torch.where(patchify(known[:, None], sides).all(-1, keepdim=True), -written, written)
        numbers[:, VALUES] = written.transpose(1, 2).reshape(numbers[:, VALUES].shape)
