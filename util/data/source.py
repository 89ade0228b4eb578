"""The interface of one split of a data set: numbered images with labels, in whatever form they are stored.

Letters: C channels, V values. `shape` is the number of cells along each axis, (H, W) for images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.crop import center_crop_arr
from util.data.decode import open_as
from util.errors import UserError
from util.pixels import IMAGE_MODES, RGB, Alphabet, shape_name


class Source:
    """One split of a data set. Making it lists the images and reads none of them.

    kind             a short description for messages
    labels           (N,) int64, indices into `classes`; all 0 if there are no classes
    classes          names of the classes
    shape, alphabet  of values that are stored as a model sees them; None: images, which are converted
    can_mirror       whether a mirrored image is one of the same kind
    first_look       so many of the first images can be looked at without fetching more; None: all
    """

    shape: tuple[int, ...] | None = None
    alphabet: Alphabet | None = None
    can_mirror = True
    first_look: int | None = None

    def __init__(self, kind: str, labels: Sequence[int], classes: Sequence[str]):
        self.kind, self.labels, self.classes = kind, np.asarray(labels, dtype=np.int64), list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where a person finds image `index`: its path, or its file and row."""
        raise NotImplementedError

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        """Image `index` in Pillow's mode "L", "RGB" or "RGBA", uncropped.

        Raises UserError, which names the image, if it cannot be read.
        """
        raise NotImplementedError

    def check(self, shape: tuple[int, ...], alphabet: Alphabet) -> None:
        """Raises UserError if no image can be read as values of this shape and alphabet."""
        if not (alphabet.is_image(shape) and alphabet.is_ordinal):
            raise UserError(
                f"{self.name(0)}: an image has two axes, 1, 3 or 4 channels and up to 256 ordinal values; "
                f"a model of {describe(shape, alphabet)} needs arrays (docs/data.md)"
            )

    def cells(self, index: int, shape: tuple[int, ...], alphabet: Alphabet) -> Tensor:
        """The values of image `index`: (C, *shape) of the alphabet's dtype.

        An image is scaled to cover `shape` and cropped at its centre. `shape` and `alphabet` are those of a
        `check`. Raises UserError, which names the image, if it cannot be read. The error has a range `images`
        if these cannot be read either.
        """
        image = center_crop_arr(self.image(index, IMAGE_MODES[alphabet.channels]), shape)
        samples = np.array(image).reshape(*shape, alphabet.channels)
        return torch.from_numpy(alphabet.from_bytes(samples)).permute(2, 0, 1).contiguous()


class Files(Source):
    """Images that are one file each."""

    def __init__(self, kind: str, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]):
        super().__init__(kind, labels, classes)
        self.paths = paths

    def name(self, index: int) -> str:
        return self.paths[index]

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        return open_as(self.paths[index], mode)


def describe(shape: tuple[int, ...], alphabet: Alphabet) -> str:
    """What a model or a pack holds, for messages: "64 px", or "28x20 px, 1 channel of 17 ordinal values"."""
    channels, number, kind = cells_of(alphabet)
    size = shape_name(shape) + " px" * (len(shape) == 2)
    if cells_of(alphabet) == cells_of(RGB) and len(shape) == 2:
        return size
    return f"{size}, {channels} channel{'s' * (channels > 1)} of {number} {kind} values"


def cells_of(alphabet: Alphabet) -> tuple[int, int, str]:
    """What of an alphabet concerns data: channels, number of values, and their kind."""
    return alphabet.channels, alphabet.num_values, alphabet.value_kind


class Mapped:
    """An array of rows that stays in its file and is read from there through a memory map.

    Pickling it for a worker process passes on the file's path and the offset in it, not the rows.
    """

    def __init__(self, path: str, offset: int, shape: tuple[int, ...], dtype: str = "|u1", order: str = "C"):
        self.arguments = path, offset, shape, dtype, order
        self.rows = np.memmap(path, dtype, "r", offset, shape, order)
        self.shape, self.dtype = self.rows.shape, self.rows.dtype

    def __reduce__(self):
        return Mapped, self.arguments

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self.rows[index])
