"""How the canvas grew, as a GIF or MP4."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from util.errors import UserError
from util.files import atomic_write
from util.pixels import make_sheet, to_pil


class Growth:
    """Step callback that keeps a sheet of the canvas after each step, at most `limit` images of it."""

    def __init__(self, columns: int, zoom: int = 1, limit: int = 64):
        self.columns, self.zoom, self.limit, self.frames = columns, zoom, limit, []

    def __call__(self, step: int, num_steps: int, canvas: Tensor) -> None:
        self.frames.append(make_sheet(to_pil(canvas[: self.limit]), self.columns, self.zoom))


def save_animation(path: Path, frames: Sequence[Image.Image], fps: float = 12, hold: float = 2.0) -> None:
    """Frames of one size -> a GIF (256 colours a frame) or MP4, by the file's name. The last frame stays for `hold` seconds.

    Raises UserError for another name, and where nothing installed writes MP4.
    """
    writers = {".gif": save_gif, ".mp4": save_mp4}
    if path.suffix.lower() not in writers:
        raise UserError(f"{path}: an animation's name must end in {' or '.join(writers)}")
    with atomic_write(path) as temporary:
        writers[path.suffix.lower()](temporary, frames, fps, hold)


def to_gif(frames: Sequence[Image.Image], fps: float = 12, hold: float = 2.0) -> bytes:
    """What `save_animation` would write, for a notebook."""
    buffer = io.BytesIO()
    save_gif(buffer, frames, fps, hold)
    return buffer.getvalue()


def save_gif(path: Path | io.BytesIO, frames: Sequence[Image.Image], fps: float, hold: float) -> None:
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * hold)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_mp4(path: Path, frames: Sequence[Image.Image], fps: float, hold: float) -> None:
    """By imageio with its ffmpeg (H.264, which browsers play), else by OpenCV (MPEG-4)."""
    frames = [even(np.asarray(frame)) for frame in [*frames, *[frames[-1]] * round(hold * fps)]]
    whole_name = path.with_name(f"{path.name}.mp4")  # both go by the name's end
    try:
        write_imageio(whole_name, frames, fps) if has_ffmpeg() else write_opencv(whole_name, frames, fps)
        whole_name.replace(path)
    finally:
        whole_name.unlink(missing_ok=True)


def even(frame: np.ndarray) -> np.ndarray:
    """With a row and a column more where the codec needs them."""
    return np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")


def has_ffmpeg() -> bool:
    try:
        import imageio.v2  # noqa: F401
        import imageio_ffmpeg

        return bool(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return False


def write_imageio(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    import imageio.v2

    imageio.v2.mimwrite(path, frames, fps=fps, codec="libx264", macro_block_size=2, quality=9)


def write_opencv(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "nothing here writes MP4: pip install imageio[ffmpeg], or opencv-python-headless; or give .gif"
        ) from error
    height, width, _ = frames[0].shape
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise UserError("OpenCV writes no MP4 here: pip install imageio[ffmpeg]; or give .gif")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
