"""Bach's four-voice chorales as grids of one axis: sixteenth notes, each with a cell for every voice.

A cell is HOLD (what the voice does goes on), REST, or the pitch of a note that begins. The chorales come from
the corpus of the package music21. Letters: T sixteenths, N windows, 4 voices: soprano, alto, tenor, bass.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from util.errors import UserError, reading
from util.files import atomic_write

VOICES = ("soprano", "alto", "tenor", "bass")
HOLD, REST, FIRST = 0, 1, 2  # values of a cell; FIRST is the value of the lowest pitch
LOWEST, HIGHEST = 36, 81  # MIDI numbers of the corpus's lowest and highest pitch, C2 and A5
NUM_VALUES = FIRST + HIGHEST - LOWEST + 1
BAR, BEAT = 16, 4  # sixteenths
BARS = 4  # of a window
LENGTH = BARS * BAR
SHIFTS = range(-5, 7)  # semitones of transposition, for training only
HELD_OUT = 6  # every 6th family of pieces is held out
Note = tuple[int, int, int]  # first sixteenth, sixteenths, MIDI number


@dataclass(frozen=True)
class Piece:
    """A chorale: its name in the corpus, cells (T, 4), uint8, and the sixteenths where whole bars begin."""

    name: str
    cells: np.ndarray
    bars: tuple[int, ...]

    def starts(self, count: int = BARS) -> list[int]:
        """The bars that begin `count` whole bars without a gap."""
        return [bar for bar in self.bars if all(bar + BAR * i in self.bars for i in range(count))]


def encode(voices: Sequence[Iterable[Note]], length: int) -> np.ndarray:
    """Turns the notes of four voices into cells (length, 4), uint8. A voice rests where it has no note."""
    cells = np.full((length, len(voices)), REST, np.uint8)
    for voice, notes in enumerate(voices):
        for start, duration, pitch in notes:
            if not LOWEST <= pitch <= HIGHEST:
                raise UserError(f"pitch {pitch} must be a MIDI number from {LOWEST} to {HIGHEST}")
            cells[start : start + duration, voice] = HOLD
            cells[start, voice] = FIRST + pitch - LOWEST
    return cells


def sounding(cells: np.ndarray) -> np.ndarray:
    """Cells (..., T, 4) -> the MIDI number that each voice sounds at each sixteenth, 0 where it is silent.

    It is int64 of the same shape. A voice is silent before its first note.
    """
    times = np.arange(cells.shape[-2])[:, None]
    last = np.maximum.accumulate(np.where(cells == HOLD, -1, times), axis=-2)  # where the voice last changed
    values = np.take_along_axis(cells, np.maximum(last, 0), axis=-2).astype(np.int64)
    return np.where(values >= FIRST, values - FIRST + LOWEST, 0)


def decode(cells: np.ndarray) -> list[list[Note]]:
    """Turns cells (T, 4) into the notes of each voice; undoes `encode`."""
    voices = []
    for voice in range(cells.shape[1]):
        values = cells[:, voice]
        changes = [*np.flatnonzero(values != HOLD).tolist(), len(values)]
        voices.append(
            [
                (start, end - start, int(values[start]) - FIRST + LOWEST)
                for start, end in pairwise(changes)
                if values[start] >= FIRST
            ]
        )
    return voices


def cut(cells: np.ndarray, start: int, length: int = LENGTH) -> np.ndarray:
    """Cuts `length` sixteenths out of cells (T, 4). A note that goes on from before begins anew there."""
    part, pitch = cells[start : start + length].copy(), sounding(cells[: start + 1])[-1]
    held = part[0] == HOLD
    part[0, held] = np.where(pitch[held] > 0, FIRST + pitch[held] - LOWEST, REST)
    return part


def transpose(cells: np.ndarray, semitones: int) -> np.ndarray:
    """Moves all pitches; the caller sees to it that they stay within LOWEST..HIGHEST."""
    return np.where(cells >= FIRST, cells + np.int64(semitones), cells).astype(np.uint8)


def voice_ranges(pieces: Iterable[Piece]) -> np.ndarray:
    """The lowest and the highest value of a pitch in each voice, over all pieces: (2, 4)."""
    cells = np.concatenate([piece.cells for piece in pieces]).astype(np.int64)
    return np.stack([np.where(cells < FIRST, NUM_VALUES, cells).min(0), cells.max(0)])


def shifts_within(cells: np.ndarray, ranges: np.ndarray) -> list[int]:
    """The transpositions in SHIFTS after which each voice of cells (T, 4) is within `ranges` (2, 4)."""
    low, high = voice_ranges([Piece("", cells, ())])
    return [s for s in SHIFTS if (low + s >= ranges[0]).all() and (high + s <= ranges[1]).all()]


def whole_bars(measures: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Finds the whole bars among measures (start, length), in sixteenths.

    A repeat sign may divide a bar into two short measures; it is one bar here. Pick-ups are left out.
    """
    bars, number = [], 0
    while number < len(measures):
        start, length = measures[number]
        following = measures[number + 1][1] if number + 1 < len(measures) else 0
        whole, divided = length == BAR, length < BAR and length + following == BAR
        if whole or divided:
            bars.append(start)
        number += 1 + divided
    return tuple(bars)


def read_score(score, name: str) -> Piece | str:
    """Turns a music21 score into a Piece, or says in a few words why it is left out."""
    parts = list(score.parts)
    if len(parts) != len(VOICES):  # instruments double the voices or add to them
        parts = [part for voice in VOICES for part in parts if part.partName == voice.capitalize()]
        if len(parts) != len(VOICES) or len({part.partName for part in parts}) != len(VOICES):
            return "no four voices"
    signatures = {sign.ratioString for part in parts for sign in part.flatten().getTimeSignatures()}
    if signatures != {"4/4"}:
        return "not in 4/4 throughout"
    voices = []
    for part in parts:
        notes = []
        for note in part.flatten().notes:
            start, duration = (4 * number for number in (note.offset, note.duration.quarterLength))
            if start % 1 or duration % 1:
                return "notes shorter than a sixteenth"
            pitch = note.pitches[-1].midi  # the highest, where a part divides
            ends = notes and (sum(notes[-1][:2]), notes[-1][2])
            if note.tie is not None and note.tie.type != "start" and ends == (start, pitch):
                notes[-1] = (notes[-1][0], notes[-1][1] + int(duration), pitch)
            elif duration:  # not a grace note
                notes.append((int(start), int(duration), pitch))
        voices.append(notes)
    measures = [
        (int(4 * measure.offset), int(4 * measure.duration.quarterLength))
        for measure in parts[0].getElementsByClass("Measure")
    ]
    return Piece(name, encode(voices, sum(measures[-1])), whole_bars(measures))


def read_corpus(limit: int | None = None) -> tuple[list[Piece], Counter]:
    """Reads music21's chorales, all or the first `limit`: those that are kept, and why how many are not.

    A piece that equals an earlier one is left out. It takes a minute. Raises UserError without music21.
    """
    try:
        import music21
    except ImportError as error:
        raise UserError("the chorales are in the package music21; pip install -e '.[music]'") from error
    pieces, left_out, seen = [], Counter(), set()
    folder = Path(music21.__file__).parent / "corpus" / "bach"
    for path in sorted(file for file in folder.iterdir() if file.suffix in (".mxl", ".xml", ".krn"))[:limit]:
        piece = read_score(music21.converter.parseFile(path, forceSource=True, storePickle=False), path.stem)
        if isinstance(piece, Piece) and piece.cells.tobytes() in seen:
            piece = "the same as another piece"
        if isinstance(piece, str):
            left_out[piece] += 1
        else:
            seen.add(piece.cells.tobytes())
            pieces.append(piece)
    return pieces, left_out


def families(pieces: Sequence[Piece]) -> list[str]:
    """Names the family of each piece. Pieces of a family go to the same split.

    Two pieces are of a family if their names differ only after a hyphen, or if the sopranos of any four bars
    agree at each beat, in whatever key.
    """
    parent = {piece.name: piece.name for piece in pieces}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    alike = defaultdict(list)
    for piece in pieces:
        alike[piece.name.partition("-")[0]].append(piece.name)
        for start in piece.starts():
            beats = sounding(piece.cells)[start : start + LENGTH : BEAT, 0]
            alike[tuple((beats - beats[0]).tolist())].append(piece.name)
    for names in alike.values():
        for name in names:
            parent[root(name)] = root(names[0])
    return [root(piece.name) for piece in pieces]


def split(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Holds out every 6th family, in the order of a hash of their names: training and held-out pieces."""
    names = families(pieces)
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = set(ordered[::HELD_OUT])
    return tuple(
        [piece for piece, name in zip(pieces, names, strict=True) if (name in held_out) == wanted]
        for wanted in (False, True)
    )


def windows(pieces: Iterable[Piece], ranges: np.ndarray | None = None) -> np.ndarray:
    """Cuts windows of BARS whole bars out of the pieces: (N, LENGTH, 4), uint8, no two equal.

    With `ranges`, for training, a window begins at each bar and comes in all keys in which each voice keeps
    to its range. Without, for measuring, one window follows the other, in the pieces' own keys.
    """
    found = {}
    for piece in pieces:
        for start in piece.starts()[:: BARS if ranges is None else 1]:
            window = cut(piece.cells, start)
            for semitones in [0] if ranges is None else shifts_within(window, ranges):
                moved = transpose(window, semitones)
                found[moved.tobytes()] = moved
    return np.stack(list(found.values()))


def load_corpus(path: Path, limit: int | None = None) -> tuple[list[Piece], dict[str, int]]:
    """Returns what `read_corpus` does. Writes it to a JSON file, and reads it from there the next time."""
    if not path.exists():
        pieces, left_out = read_corpus(limit)
        listed = [{"name": one.name, "bars": one.bars, "cells": one.cells.tolist()} for one in pieces]
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"left_out": left_out, "pieces": listed}))
    with reading(path, "is damaged; delete it"):
        stored = json.loads(path.read_text())
        pieces = [
            Piece(one["name"], np.array(one["cells"], np.uint8), tuple(one["bars"]))
            for one in stored["pieces"]
        ]
    return pieces, stored["left_out"]


def save_windows(path: Path, windows: np.ndarray) -> None:
    """Writes windows (N, T, 4) as an .npz file of one array, as --data_path takes it."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, windows=windows)
