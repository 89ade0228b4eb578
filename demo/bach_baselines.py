"""Predictors of chorales without a network: counts that back off to shorter contexts, and file compressors.

Letters: N windows, T sixteenths, E events. An event is the value of one cell.
"""

import gzip
import lzma
from collections.abc import Callable, Sequence

import numpy as np
from bach_data import (
    BEAT,
    HOLD,
    NUM_VALUES,
    VOICES,
    Piece,
    sounding,
    split,
    windows,
)

START = NUM_VALUES  # stands for what was before a window
DISCOUNTS = (0.1, 0.3, 0.6, 0.9, 1.5, 3.0, 6.0, 12.0)  # that are tried
Contexts = Callable[[np.ndarray, int], list[np.ndarray]]


class Backoff:
    """Predicts the values of events from how often they followed the same context in other events.

    It is interpolated absolute discounting: a number is taken off each count, and what is taken off in a
    context goes to the distribution of the order below; below order 0 all values are alike. So probabilities
    sum to 1 for each context and for all discounts.

    contexts  features (E,) of each event, integers from 0, the most important first: order k looks at k
    values    (E,) from 0 to NUM_VALUES - 1
    counted   (E,) bool: events that are counted; the others are predicted
    """

    def __init__(self, contexts: Sequence[np.ndarray], values: np.ndarray, counted: np.ndarray):
        self.orders, context = [], np.zeros(len(values), np.int64)
        for feature in (np.zeros_like(context), *contexts):
            context = np.unique(context * (feature.max() + 1) + feature, return_inverse=True)[1]
            pairs, pair = np.unique(context * NUM_VALUES + values, return_inverse=True)
            counts = np.bincount(pair[counted], minlength=len(pairs))
            self.orders.append((counts, pairs // NUM_VALUES, pair[~counted], context[~counted]))

    def probabilities(self, discounts: Sequence[float]) -> np.ndarray:
        """The probability of the value of each predicted event; one discount for each order 0, 1, …"""
        probs = 1 / NUM_VALUES
        for (counts, contexts, pair, context), discount in zip(self.orders, discounts, strict=True):
            total = np.bincount(contexts, counts)[context]
            taken = np.bincount(contexts, np.minimum(counts, discount))[context]
            own = np.maximum(counts - discount, 0)[pair]
            probs = np.where(total > 0, (own + taken * probs) / np.maximum(total, 1), probs)
        return probs

    def tune(self) -> list[float]:
        """Chooses the discounts that predict best, one after the other, twice."""
        chosen = [0.9] * len(self.orders)
        for order in [*reversed(range(len(chosen)))] * 2:
            tried = [[*chosen[:order], discount, *chosen[order + 1 :]] for discount in DISCOUNTS]
            chosen = max(tried, key=lambda discounts: np.log(self.probabilities(discounts)).mean())
        return chosen


def before(values: np.ndarray, steps: int) -> np.ndarray:
    """(N, T) -> the values `steps` sixteenths earlier, START before the window."""
    return np.pad(values, ((0, 0), (steps, 0)), constant_values=START)[:, : values.shape[1]]


def unigram(cells: np.ndarray, voice: int) -> list[np.ndarray]:
    """No context."""
    return []


def five_gram(cells: np.ndarray, voice: int) -> list[np.ndarray]:
    """The four cells before this one in the same voice."""
    return [before(cells[..., voice], steps) for steps in (1, 2, 3, 4)]


def since_change(cells: np.ndarray, voice: int) -> np.ndarray:
    """How many sixteenths ago the voice last changed, seen from the cell before; at most 8."""
    times = np.arange(cells.shape[1])
    changed = np.maximum.accumulate(np.where(cells[..., voice] == HOLD, -1, times), axis=1)
    return before(np.minimum(times - changed, 8), 1)


def voices_above(cells: np.ndarray, voice: int) -> list[np.ndarray]:
    """What a musician would look at: the beat, the voice's own past, and the voices above at the same time.

    These are the place in the beat, which voices above hold, the voice's pitch before and its age, and what
    the voices above sound, the soprano first.
    """
    pitches = sounding(cells)
    beat = np.broadcast_to(np.arange(cells.shape[1]) % BEAT, cells.shape[:2])
    holds = [cells[..., other] == HOLD for other in range(voice)]
    above = [pitches[..., other] for other in (0, *range(voice - 1, 0, -1))[:voice]]
    return [beat, *holds, before(pitches[..., voice], 1), since_change(cells, voice), *above]


COUNTED = {
    "unigram, each voice alone": unigram,
    "5-gram, each voice alone": five_gram,
    "counts, with the voices above": voices_above,
}


def count_bits(
    train: Sequence[Piece], ranges: np.ndarray, val: np.ndarray, contexts: Contexts
) -> list[float]:
    """Bits per sixteenth of each voice of held-out windows (N, T, 4), predicted by `Backoff`.

    Counts all training windows in all keys, as the model sees them. The discounts are chosen on every
    HELD_OUT-th family of the training pieces, which is not counted meanwhile.
    """

    def predictor(counted: np.ndarray, predicted: np.ndarray, voice: int) -> Backoff:
        cells = np.concatenate([counted, predicted]).astype(np.int64)
        features = [feature.reshape(-1).astype(np.int64) for feature in contexts(cells, voice)]
        where = np.arange(len(cells)) < len(counted)
        return Backoff(features, cells[..., voice].reshape(-1), where.repeat(cells.shape[1]))

    fitted, tuned = split(train)
    part, rest, whole = windows(fitted, ranges), windows(tuned), windows(train, ranges)
    bits = []
    for voice in range(len(VOICES)):
        discounts = predictor(part, rest, voice).tune()
        bits.append(float(-np.log2(predictor(whole, val, voice).probabilities(discounts)).mean()))
    return bits


def file_bits(val: np.ndarray) -> dict[str, float]:
    """Bits per sixteenth of held-out windows (N, T, 4), all together in one compressed file of their bytes.

    The voices are stored one after the other or cell by cell, whichever is smaller.
    """
    orders = [val.tobytes(), np.moveaxis(val, -1, 0).tobytes()]
    coders = {
        "gzip -9": lambda data: gzip.compress(data, 9),
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    sixteenths = val.shape[0] * val.shape[1]
    return {name: 8 * min(len(code(data)) for data in orders) / sixteenths for name, code in coders.items()}
