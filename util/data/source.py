"""The interface of one split of a data set: numbered images with labels, in whatever form they are stored."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.crop import center_crop_arr
from util.data.decode import open_rgb


class Source:
    """One split of a data set. Making it lists the images and reads none of them.

    kind      a short description for messages
    labels    (N,) int64, indices into `classes`; all 0 if there are no classes
    classes   names of the classes
    img_size  height and width of the images if they are already cropped, else None
    """

    img_size: int | None = None

    def __init__(self, kind: str, labels: Sequence[int], classes: Sequence[str]):
        self.kind, self.labels, self.classes = kind, np.asarray(labels, dtype=np.int64), list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where a person finds image `index`: its path, or its file and row."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB, uncropped. Raises UserError, which names the image, if it cannot be read."""
        raise NotImplementedError

    def crop(self, index: int, size: int) -> Tensor:
        """The centre of image `index` after the ADM crop: uint8 (3, size, size)."""
        image = center_crop_arr(self.image(index), size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Files(Source):
    """Images that are one file each."""

    def __init__(self, kind: str, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]):
        super().__init__(kind, labels, classes)
        self.paths = paths

    def name(self, index: int) -> str:
        return self.paths[index]

    def image(self, index: int) -> Image.Image:
        return open_rgb(self.paths[index])


class Mapped:
    """An array of uint8 rows that stays in its file and is read from there through a memory map.

    Pickling it for a worker process passes on the file's path and the offset in it, not the rows.
    """

    def __init__(self, path: str, offset: int, shape: tuple[int, ...]):
        self.arguments = path, offset, shape
        self.rows = np.memmap(path, np.uint8, "r", offset, shape)

    def __reduce__(self):
        return Mapped, self.arguments

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self.rows[index])
