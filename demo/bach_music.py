"""What four voices are to a listener: a MIDI file, the faults that a teacher counts, bars known by heart.

Letters: N windows, T sixteenths, 4 voices.
"""

import struct
from itertools import combinations

import numpy as np
from bach_data import BAR, BEAT, FIRST, LOWEST, VOICES, cut, decode, sounding

TICKS = 120  # of MIDI time in a sixteenth
QUARTERS_PER_MINUTE = 76
CHURCH_ORGAN = 19  # a program of General MIDI
# MIDI numbers that textbooks allow: C4-A5, G3-E5, C3-A4, E2-D4
RANGES = {"soprano": (60, 81), "alto": (55, 76), "tenor": (48, 69), "bass": (40, 62)}


def midi_file(cells: np.ndarray) -> bytes:
    """Turns cells (T, 4) into a standard MIDI file, format 1: a track for the tempo, one for each voice."""
    tempo = struct.pack(">I", 60_000_000 // QUARTERS_PER_MINUTE)[1:]
    tracks = [b"\0\xff\x51\x03" + tempo + b"\0\xff\x58\x04\x04\x02\x18\x08"]  # tempo, 4/4
    for channel, (name, notes) in enumerate(zip(VOICES, decode(cells), strict=True)):
        events = [(start, 0x90 | channel, pitch, 80) for start, _, pitch in notes]
        events += [(start + duration, 0x80 | channel, pitch, 0) for start, duration, pitch in notes]
        track = b"\0\xff\x03" + bytes([len(name)]) + name.encode() + bytes([0, 0xC0 | channel, CHURCH_ORGAN])
        now = 0
        for time, *event in sorted(events):  # notes end before others begin: 0x80 is below 0x90
            track += _variable_length((time - now) * TICKS) + bytes(event)
            now = time
        tracks.append(track)
    header = b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), BEAT * TICKS)
    ended = (track + b"\0\xff\x2f\0" for track in tracks)
    return header + b"".join(b"MTrk" + struct.pack(">I", len(track)) + track for track in ended)


def _variable_length(number: int) -> bytes:
    """MIDI's way to write a number: seven bits a byte, the last byte below 128."""
    digits = [number & 127]
    while number := number >> 7:
        digits.append(number & 127 | 128)
    return bytes(reversed(digits))


def count_faults(windows: np.ndarray) -> dict[str, float]:
    """Counts in windows (N, T, 4), for 100 bars each, what a teacher of harmony would mark.

    parallel fifths, octaves  two voices move in the same direction at one sixteenth, from a perfect fifth to
                              another, or from an octave or unison to another; compound ones count
    voice crossings           a voice comes to lie above the next higher one
    out of range, <voice>     a note outside RANGES begins
    """
    pitches = sounding(windows)
    past, now = pitches[:, :-1], pitches[:, 1:]
    counts = {"parallel fifths": 0, "parallel octaves": 0}
    for upper, lower in combinations(range(len(VOICES)), 2):
        heard = (pitches[..., upper] > 0) & (pitches[..., lower] > 0)
        steps = [now[..., voice] - past[..., voice] for voice in (upper, lower)]
        together = heard[:, 1:] & heard[:, :-1] & (steps[0] * steps[1] > 0)
        gaps = [np.abs(part[..., upper] - part[..., lower]) % 12 for part in (past, now)]
        for name, interval in (("parallel fifths", 7), ("parallel octaves", 0)):
            counts[name] += (together & (gaps[0] == interval) & (gaps[1] == interval)).sum()
    crossed = (pitches[..., 1:] > pitches[..., :-1]) & (pitches[..., :-1] > 0)
    counts["voice crossings"] = crossed[:, 0].sum() + (crossed[:, 1:] & ~crossed[:, :-1]).sum()
    begun = np.where(windows >= FIRST, windows.astype(np.int64) - FIRST + LOWEST, 0)
    for voice, (name, (low, high)) in enumerate(RANGES.items()):
        notes = begun[..., voice]
        counts[f"out of range, {name}"] = ((notes > 0) & ((notes < low) | (notes > high))).sum()
    bars = windows.shape[0] * windows.shape[1] / BAR
    return {name: float(100 * count / bars) for name, count in counts.items()}


def share_known(windows: np.ndarray, train: np.ndarray, bars: int) -> float:
    """The share of the runs of `bars` bars in windows that occur, note for note, in training windows.

    Windows are (N, T, 4). Runs begin at any bar. Training windows have the keys of training.
    """

    def runs(part: np.ndarray) -> list[bytes]:
        starts = range(0, part.shape[1] - bars * BAR + 1, BAR)
        return [cut(window, start, bars * BAR).tobytes() for window in part for start in starts]

    known, found = set(runs(train)), runs(windows)
    return sum(run in known for run in found) / len(found)
