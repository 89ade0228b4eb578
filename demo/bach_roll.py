"""Draws four voices as a piano roll: time to the right, pitch upwards, a colour for each voice."""

from collections.abc import Sequence

import numpy as np
from bach_data import BAR, BEAT, VOICES, decode
from PIL import Image, ImageDraw

COLOURS = {"soprano": "#d1495b", "alto": "#e3962e", "tenor": "#3a8f6e", "bass": "#33658a"}
PAPER, BLACK_KEY, FILLED, INK = "#ffffff", "#f4f4f6", "#fff2c2", "#30343f"
BEAT_LINE, BAR_LINE = "#e2e4ea", "#8d93a3"
CELL, ROW = 15, 9  # pixels of a sixteenth and of a semitone
LEFT, TOP, GAP = 58, 62, 26  # room for names of pitches, for a title and bars' numbers, below a roll
FONT = 22
BLACK_KEYS = (1, 3, 6, 8, 10)  # semitones above C


def draw_rolls(rolls: Sequence[tuple[str, np.ndarray, tuple[int, int] | None]]) -> Image.Image:
    """Draws rolls below each other, and a legend.

    Each roll is a title, cells (T, 4), of one length for all, and which sixteenths to mark as filled in by a
    model, from the first to before the second; None marks nothing.
    """
    notes = [decode(cells) for _, cells, _ in rolls]
    pitches = [pitch for voices in notes for voice in voices for _, _, pitch in voice] or [60]
    low, high = min(pitches) - 2, max(pitches) + 2
    width, height = LEFT + len(rolls[0][1]) * CELL + 20, (high - low + 1) * ROW
    sheet = Image.new("RGB", (width, 44 + len(rolls) * (TOP + height + GAP)), PAPER)
    draw, x = ImageDraw.Draw(sheet), LEFT
    for name, colour in COLOURS.items():
        draw.rounded_rectangle((x, 16, x + 30, 34), 5, fill=colour)
        draw.text((x + 40, 25), name, INK, font_size=FONT, anchor="lm")
        x += 80 + draw.textlength(name, font_size=FONT)
    if any(filled for _, _, filled in rolls):
        draw.rectangle((x, 14, x + 30, 36), fill=FILLED, outline=BAR_LINE)
        draw.text((x + 40, 25), "filled in", INK, font_size=FONT, anchor="lm")
    for number, ((title, cells, filled), voices) in enumerate(zip(rolls, notes, strict=True)):
        top = 44 + number * (TOP + height + GAP) + TOP
        draw.text((LEFT, top - 44), title, INK, font_size=FONT, anchor="lm")
        _draw_paper(draw, top, low, high, len(cells), filled)
        _draw_notes(draw, top, high, voices)
    return sheet


def _draw_paper(draw: ImageDraw.ImageDraw, top: int, low: int, high: int, length: int, filled) -> None:
    """Rows of black keys, lines of beats and bars, names of the Cs, numbers of the bars."""
    right, bottom = LEFT + length * CELL, top + (high - low + 1) * ROW
    for pitch in range(low, high + 1):
        if pitch % 12 in BLACK_KEYS:
            y = top + (high - pitch) * ROW
            draw.rectangle((LEFT, y, right, y + ROW - 1), fill=BLACK_KEY)
    if filled:
        draw.rectangle((LEFT + filled[0] * CELL, top, LEFT + filled[1] * CELL, bottom), fill=FILLED)
    for pitch in range(low, high + 1):
        if pitch % 12 == 0:
            y = top + (high - pitch + 1) * ROW
            draw.line((LEFT, y, right, y), BEAT_LINE, 1)
            draw.text((LEFT - 8, y - ROW / 2), f"C{pitch // 12 - 1}", INK, font_size=FONT, anchor="rm")
    for time in range(0, length + 1, BEAT):
        bar = time % BAR == 0
        x = LEFT + time * CELL
        draw.line((x, top, x, bottom), BAR_LINE if bar else BEAT_LINE, 3 if bar else 1)
        if bar and time < length:
            draw.text((x + 6, top - 14), f"bar {time // BAR + 1}", BAR_LINE, font_size=FONT - 4, anchor="lm")


def _draw_notes(draw: ImageDraw.ImageDraw, top: int, high: int, voices) -> None:
    """Each note as a bar of its voice's colour; where voices share a pitch, a stripe is the higher one."""
    sung, thin = {}, ROW // 3
    for name, notes in zip(VOICES, voices, strict=True):
        for start, duration, pitch in notes:
            x, y = LEFT + start * CELL, top + (high - pitch) * ROW
            box = (x + 2, y, x + duration * CELL - 2, y + ROW - 1)
            draw.rounded_rectangle(box, 3, fill=COLOURS[name])
            for time in range(start, start + duration):
                if other := sung.get((time, pitch)):
                    x = LEFT + time * CELL
                    draw.rectangle((x, y + thin, x + CELL - 1, y + ROW - 1 - thin), fill=COLOURS[other])
                sung[time, pitch] = name
