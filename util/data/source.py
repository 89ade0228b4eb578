"""What a split of a data set is to the rest: numbered images with labels, whatever lies on the disk."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.crop import center_crop_arr, fast_center_crop
from util.data.decode import open_rgb


class Source:
    """One split, listed but not read.

    kind      what it is, in words
    labels    (N,) int64, numbers into `classes`; all 0 where there are no classes
    img_size  the side of its images where they are cropped already, else None
    """

    img_size: int | None = None

    def __init__(self, kind: str, labels: Sequence[int], classes: Sequence[str]):
        self.kind, self.labels, self.classes = kind, np.asarray(labels, dtype=np.int64), list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What a person finds image `index` by."""
        raise NotImplementedError

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """RGB. Raises UserError that names an image which cannot be read. `at_least`: see `open_rgb`."""
        raise NotImplementedError

    def levels(self, index: int, size: int, fast: bool = False) -> Tensor:
        """The centre of image `index`, uint8 (3, size, size). fast: `fast_center_crop` instead of the ADM crop."""
        if fast:
            return fast_center_crop(self.image(index, at_least=2 * size), size)
        return (
            torch.from_numpy(np.array(center_crop_arr(self.image(index), size))).permute(2, 0, 1).contiguous()
        )


class Files(Source):
    """A file an image."""

    def __init__(self, kind: str, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]):
        super().__init__(kind, labels, classes)
        self.paths = paths

    def name(self, index: int) -> str:
        return self.paths[index]

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        return open_rgb(self.paths[index], at_least)


class Mapped:
    """uint8 rows that lie in a file as they are, read from there. Another process is handed the place, not the rows."""

    def __init__(self, path: str, offset: int, shape: tuple[int, ...]):
        self.place = path, offset, shape
        self.rows = np.memmap(path, np.uint8, "r", offset, shape)

    def __reduce__(self):
        return Mapped, self.place

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self.rows[index])
