"""What a model was trained on, what it cannot do, and whether an image is unlike its training images."""

import math
from dataclasses import dataclass

import numpy as np

from models.likelihood.log_likelihood import log_likelihood
from util.pixels import in_words

MAX_TEXT = 300  # characters
QUICK_STEPS = 4  # steps of each MAR level: of emoji as many bits as 48 and 16 steps, to within 1%
FAR = 4  # standard deviations above the mean of held-out images


@dataclass(frozen=True)
class About:
    """What a model's user should know; `model.about`, which `save_pretrained` keeps in config.json.

    data               what the model was trained on, such as "Fashion-MNIST (60,000 images)"
    limits             what it draws and what it cannot do, in one sentence
    bits_per_dim       mean over held-out images of the bits per dimension of each, as `quick_bits_per_dim`
                       measures them; None where that was not measured
    bits_per_dim_std   their standard deviation over images

    Raises ValueError for texts that are empty, longer than 300 characters or not printable, and for numbers
    that are not finite, negative, or given without the other.
    """

    data: str
    limits: str
    bits_per_dim: float | None = None
    bits_per_dim_std: float | None = None

    def __post_init__(self):
        for name in ("data", "limits"):
            text = getattr(self, name)
            if not (isinstance(text, str) and 0 < len(text) <= MAX_TEXT and text.isprintable()):
                raise ValueError(f"about: {name} must be one line of 1 to {MAX_TEXT} printable characters")
        numbers = self.bits_per_dim, self.bits_per_dim_std
        if numbers == (None, None):
            return
        for number in numbers:
            if type(number) not in (int, float) or not (math.isfinite(number) and number >= 0):
                raise ValueError(
                    "about: bits_per_dim and bits_per_dim_std must both be numbers from 0, or both null"
                )

    @classmethod
    def of_model(cls, model, held_out: np.ndarray, data: str, limits: str) -> "About":
        """Measures a model on its held-out images, at least two: values (n, *S, C)."""
        bits = np.concatenate([quick_bits_per_dim(model, image) for image in held_out])
        return cls(data, limits, round(float(bits.mean()), 3), round(float(bits.std(ddof=1)), 3))


def quick_bits_per_dim(model, images) -> np.ndarray:
    """Bits per dimension of each of B images, (B,) float64, as `model.log_likelihood` but in few steps.

    The model is not given the class. One order is drawn, and each MAR level decides its patches in 4 steps.
    """
    steps = [min(QUICK_STEPS, generator.spec.num_patches) for generator in model.generators]
    options = dict(num_orders=1, num_inference_steps=steps, progress_bar=False)
    return -log_likelihood(model, images, **options).bits.numpy() / model.num_dims


def unlike_training(model, image) -> str | None:
    """Returns a sentence if an image is plainly unlike the training images, and None otherwise.

    It is unlike them if its `quick_bits_per_dim` are more than 4 standard deviations above the mean of the
    held-out images. A smooth image, such as a grey photograph, can be unlike them and still cost few bits. If
    no bits of held-out images are known, the answer is None.
    """
    about = model.about
    if about is None or about.bits_per_dim is None:
        return None
    bits = quick_bits_per_dim(model, image)[0]
    if bits <= about.bits_per_dim + FAR * about.bits_per_dim_std:
        return None
    return (
        f"This image costs the model {bits:.1f} bits per dimension, held-out images "
        f"{about.bits_per_dim:.1f} ± {about.bits_per_dim_std:.1f}: it is unlike what the model was trained "
        f"on, {about.data}, so what is drawn may not fit it."
    )


def describe(model, name: str) -> str:
    """Returns one line that names a model, its size, its training data, and what it cannot do."""
    size = sum(parameter.numel() for parameter in model.parameters())
    classes = f", {model.class_num:,} classes" if model.class_num > 1 else ""
    head = f"{name}: {size / 1e6:.3g} M parameters, {in_words(model.image_shape)}{classes}"
    if model.about is None:
        return f"{head}. What it was trained on is not recorded."
    return f"{head}. Trained on {model.about.data}. {model.about.limits}"
