"""Animations of a growing canvas, as GIF or MP4 files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from util.errors import UserError
from util.files import atomic_write
from util.pixels import Alphabet, make_sheet


class Growth:
    """A step callback that keeps the canvas after each step, as a sheet of its first `limit` images."""

    def __init__(self, alphabet: Alphabet, columns: int, zoom: int = 1, limit: int = 64):
        self.alphabet, self.columns, self.zoom = alphabet, columns, zoom
        self.limit, self.frames = limit, []

    def __call__(self, step: int, num_steps: int, canvas: Tensor) -> None:
        self.frames.append(make_sheet(self.alphabet.to_pil(canvas[: self.limit]), self.columns, self.zoom))


def check_can_write(path: Path) -> None:
    """Raises UserError unless `path` ends in .gif, or in .mp4 and imageio-ffmpeg is installed."""
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise UserError(f"{path}: the name of an animation must end in .gif or .mp4")
    if path.suffix.lower() == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path}: to write MP4, pip install 'fractalgen[demo]'; or write .gif") from error


def save_animation(path: Path, frames: Sequence[Image.Image], fps: float = 12, hold: float = 2.0) -> None:
    """Writes frames of one size as GIF (256 colours per frame) or MP4 (H.264); the ending of `path` decides.

    fps   frames per second
    hold  seconds for which the last frame stays

    Raises UserError like `check_can_write`.
    """
    check_can_write(path)
    save = save_gif if path.suffix.lower() == ".gif" else save_mp4
    with atomic_write(path) as temporary:
        save(temporary, frames, fps, hold)


def to_gif(frames: Sequence[Image.Image], fps: float = 12, hold: float = 2.0) -> bytes:
    """Returns the content of the GIF file that `save_animation` would write, for a notebook."""
    buffer = io.BytesIO()
    save_gif(buffer, frames, fps, hold)
    return buffer.getvalue()


def save_gif(file: Path | io.BytesIO, frames: Sequence[Image.Image], fps: float, hold: float) -> None:
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * hold)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_mp4(path: Path, frames: Sequence[Image.Image], fps: float, hold: float) -> None:
    """Writes H.264, which browsers play. It needs even sides, so odd ones get one more row or column."""
    import imageio_ffmpeg

    frames = [np.asarray(frame) for frame in [*frames, *[frames[-1]] * round(hold * fps)]]
    height, width, _ = frames[0].shape
    padding = [(0, height % 2), (0, width % 2), (0, 0)]
    writer = imageio_ffmpeg.write_frames(
        path,
        (width + width % 2, height + height % 2),
        fps=fps,
        codec="libx264",
        macro_block_size=2,
        quality=9,
        output_params=["-f", "mp4"],  # the name of the temporary file does not end in .mp4
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.pad(frame, padding, mode="edge"))
    writer.close()
