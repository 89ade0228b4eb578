"""How long a drawing or a likelihood will take, from what this process has measured so far."""

import math

WORTH_SAYING = 10  # seconds; a shorter work is not announced


class Pace:
    """Seconds per unit of work of each kind, as last measured. Work of a kind is proportional to its time."""

    def __init__(self):
        self.rates: dict[str, float] = {}

    def measure(self, kind: str, work: float, seconds: float) -> None:
        self.rates[kind] = seconds / work

    def knows(self, kind: str) -> bool:
        return kind in self.rates

    def announce(self, kind: str, work: float) -> str:
        """Returns a sentence that says how long the work will take; "" if not long, or not known yet."""
        return announcement(self.rates.get(kind, 0.0) * work)


def announcement(seconds: float) -> str:
    return f"This takes {in_words(seconds)}." if seconds >= WORTH_SAYING else ""


def time_left(elapsed: float, done: float) -> str:
    """Returns in words how much time is left, if the whole takes long.

    done  the share of the work that is done, after `elapsed` seconds
    """
    total = elapsed / done
    return f", {in_words(total - elapsed)} left" if total >= WORTH_SAYING else ""


def in_words(seconds: float) -> str:
    """Returns a length of time as "about 20 s", "about 5 minutes" or "about 3 hours"."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s" if seconds < 20 else f"about {round(seconds, -1):.0f} s"
    minutes = seconds / 60
    return f"about {minutes:.0f} minutes" if minutes < 100 else f"about {minutes / 60:.0f} hours"


def drawing_work(model, number: int, options: dict, share: float = 1.0) -> float:
    """Returns the work of drawing images, in patches' steps of one image.

    number   of images; share: of their pixels that are drawn
    options  of `model.generate`: num_inference_steps and guidance_scale
    """
    steps = [
        generator.spec.num_patches if generator.exact_likelihood else given
        for generator, given in zip(model.generators, options["num_inference_steps"], strict=True)
    ]
    return number * share * math.prod(steps) * (2 if options["guidance_scale"] != 1 else 1)
