"""The data, baselines, counts, MIDI files and piano rolls of demo/bach.py, on music made by hand."""

import json
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import bach
import bach_baselines
import bach_data
import bach_music
from bach_data import BAR, FIRST, HOLD, LENGTH, LOWEST, NUM_VALUES, REST, Piece
from bach_roll import CELL, COLOURS, FILLED, LEFT, draw_rolls
from PIL import Image, ImageColor

from conftest import run_here
from util.errors import UserError

C_MAJOR, F_MAJOR, G_MAJOR = (72, 67, 64, 48), (72, 69, 65, 53), (71, 67, 62, 55)


def chords(*pitches: tuple[int, ...], length: int = 4) -> np.ndarray:
    """Cells of chords (soprano, alto, tenor, bass), `length` sixteenths each."""
    voices = [[(length * i, length, chord[v]) for i, chord in enumerate(pitches)] for v in range(4)]
    return bach_data.encode(voices, length * len(pitches))


def piece(name: str, seed: int, bars: int = 8) -> Piece:
    """A piece of random quarters in the middle of each voice's range."""
    rng = np.random.default_rng(seed)
    cells = chords(*(tuple(base + rng.integers(5, size=4)) for base in [np.array(C_MAJOR)] * 4 * bars))
    return Piece(name, cells, tuple(range(0, bars * BAR, BAR)))


PIECES = [piece(f"bwv{seed}", seed) for seed in range(24)]


def test_notes_come_back_from_cells():
    voices = [[(0, 4, 72), (4, 1, 74), (7, 9, 81)], [], [(2, 14, 60)], [(0, 16, 36)]]
    cells = bach_data.encode(voices, 16)
    assert cells[:8, 0].tolist() == [FIRST + 36, HOLD, HOLD, HOLD, FIRST + 38, REST, REST, FIRST + 45]
    assert bach_data.decode(cells) == voices
    heard = bach_data.sounding(cells)
    for voice, notes in enumerate(voices):
        expected = np.zeros(16)
        for start, duration, pitch in notes:
            expected[start : start + duration] = pitch
        assert np.array_equal(heard[:, voice], expected)


def test_cells_that_hold_nothing_are_silent():
    cells = np.array([[HOLD], [REST], [HOLD], [FIRST], [HOLD]], np.uint8)
    assert bach_data.sounding(cells)[:, 0].tolist() == [0, 0, 0, LOWEST, LOWEST]
    assert bach_data.decode(cells) == [[(3, 2, LOWEST)]]
    assert bach_data.cut(cells, 2, 2)[:, 0].tolist() == [REST, FIRST]


@pytest.mark.parametrize("pitch", [35, 82])
def test_a_pitch_outside_the_vocabulary_is_an_error(pitch):
    with pytest.raises(UserError, match=f"pitch {pitch} must be a MIDI number from 36 to 81"):
        bach_data.encode([[(0, 4, pitch)]], 4)


def test_a_window_begins_held_notes_anew():
    cells = bach_data.encode([[(0, 20, 72)], [(0, 8, 60)], [(10, 6, 55)], [(16, 4, 40)]], 32)
    part = bach_data.cut(cells, 12, 8)
    assert part[0].tolist() == [FIRST + 36, REST, FIRST + 19, REST]
    assert np.array_equal(bach_data.sounding(part), bach_data.sounding(cells)[12:20])
    assert cells[12, 0] == HOLD  # the piece itself is as before


def test_bars_that_a_repeat_sign_divides_are_whole_and_pickups_are_none():
    measures = [(0, 4), (4, 16), (20, 12), (32, 4), (36, 12), (48, 4), (52, 12)]
    assert bach_data.whole_bars(measures) == (4, 20, 36)
    assert Piece("", np.empty((68, 4)), (4, 20, 36, 60)).starts(2) == [4, 20]


def test_each_family_is_in_one_split():
    melody = PIECES[0].cells.copy()
    other_key = bach_data.transpose(melody, -2)
    other_key[:, 1:] = PIECES[1].cells[:, 1:]
    again = Piece("another key", other_key, PIECES[0].bars)
    variant = Piece("bwv3-b", piece("", 99).cells, PIECES[0].bars)
    pieces = [*PIECES, again, variant]
    names = bach_data.families(pieces)
    assert names[0] == names[24]
    assert names[3] == names[25]
    assert len(set(names)) == 24
    train, val = bach_data.split(pieces)
    assert len(train) + len(val) == 26
    assert len({names[pieces.index(one)] for one in val}) == 24 // bach_data.HELD_OUT
    for one, other in ((0, 24), (3, 25)):
        assert (pieces[one] in val) == (pieces[other] in val)
    assert [one.name for one in bach_data.split(pieces[::-1])[1]] == [one.name for one in val][::-1]


def test_transposition_keeps_each_voice_in_its_range_and_keeps_rhythm():
    cells = bach_data.encode([[(0, 4, 72), (4, 4, 74)], [(0, 8, 65)], [], [(2, 2, 48)]], 8)
    wide = chords((81, 74, 69, 64), (57, 53, 48, 36))
    ranges = bach_data.voice_ranges([Piece("", wide, ())])
    assert bach_data.shifts_within(cells, ranges) == list(range(-5, 7))
    ranges[:, 0] = FIRST + 70 - LOWEST, FIRST + 75 - LOWEST
    assert bach_data.shifts_within(cells, ranges) == [-2, -1, 0, 1]
    moved = bach_data.transpose(cells, -2)
    assert moved.dtype == np.uint8
    assert [[(s, d, p + 2) for s, d, p in notes] for notes in bach_data.decode(moved)] == bach_data.decode(
        cells
    )


def test_only_training_windows_are_transposed_and_overlap():
    ranges = bach_data.voice_ranges(PIECES)
    held_out = bach_data.windows(PIECES[:2])
    assert held_out.shape == (4, LENGTH, 4)
    assert np.array_equal(held_out[1], PIECES[0].cells[LENGTH:])
    trained_on = bach_data.windows(PIECES[:2], ranges)
    rows = {row.tobytes() for row in trained_on}
    assert len(rows) == len(trained_on)
    assert PIECES[0].cells[BAR : BAR + LENGTH].tobytes() in rows
    pitches = np.where(trained_on < FIRST, ranges[0], trained_on)
    assert (pitches >= ranges[0]).all()
    assert (pitches <= ranges[1]).all()


def test_the_corpus_is_read_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        bach_data, "read_corpus", lambda limit: calls.append(limit) or (PIECES[:2], Counter(odd=3))
    )
    for _ in range(2):
        pieces, left_out = bach_data.load_corpus(tmp_path / "corpus.json", 7)
        assert left_out == {"odd": 3}
        assert [one.name for one in pieces] == ["bwv0", "bwv1"]
        assert pieces[0].bars == PIECES[0].bars
        assert np.array_equal(pieces[1].cells, PIECES[1].cells)
        assert pieces[1].cells.dtype == np.uint8
    assert calls == [7]
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(UserError, match="is damaged; delete it"):
        bach_data.load_corpus(tmp_path / "corpus.json")


def test_without_music21_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "music21", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[music\]'"):
        bach_data.read_corpus()


def test_a_real_chorale_is_read_note_by_note():
    music21 = pytest.importorskip("music21")
    score = music21.corpus.parse("bach/bwv66.6")
    found = bach_data.read_score(score, "bwv66.6")
    notes = [[(4 * n.offset, n.pitch.midi) for n in part.flatten().notes if not n.tie or n.tie.type == "start"]
             for part in score.parts]  # fmt: skip
    assert [[(start, pitch) for start, _, pitch in voice] for voice in bach_data.decode(found.cells)] == notes
    assert found.bars[:2] == (4, 20)
    assert len(found.cells) == 4 * score.duration.quarterLength


def random_events(count: int, kinds: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    contexts = [rng.integers(kinds, size=count) for _ in range(2)]
    values = (contexts[0] + rng.integers(2, size=count)) % NUM_VALUES
    return contexts, values, rng.random(count) < 0.8


def test_counted_probabilities_sum_to_one_in_seen_and_unseen_contexts():
    contexts, values, counted = random_events(300, 3)
    every = np.arange(NUM_VALUES)
    for context in ((0, 0), (2, 1), (1, 7), (9, 9)):
        more = [np.append(old, np.full(NUM_VALUES, new)) for old, new in zip(contexts, context, strict=True)]
        where = np.append(counted, np.zeros(NUM_VALUES, bool))
        predictor = bach_baselines.Backoff(more, np.append(values, every), where)
        for discounts in ([0.1, 0.9, 0.5], [30.0, 4.0, 2.5]):
            probs = predictor.probabilities(discounts)[-NUM_VALUES:]
            assert probs.sum() == pytest.approx(1, abs=1e-12)
            assert probs.min() > 0


def test_counted_probabilities_are_those_of_a_count_by_hand():
    contexts, values, counted = random_events(200, 3)
    discounts = [0.3, 0.9, 1.5]

    def by_hand(context: tuple[int, ...], value: int) -> float:
        order = len(context)
        lower = by_hand(context[:-1], value) if order else 1 / NUM_VALUES
        rows = [i for i in range(200) if counted[i] and tuple(c[i] for c in contexts[:order]) == context]
        counts = Counter(values[i] for i in rows)
        if not rows:
            return lower
        taken = sum(min(count, discounts[order]) for count in counts.values())
        return (max(counts[value] - discounts[order], 0) + taken * lower) / len(rows)

    found = bach_baselines.Backoff(contexts, values, counted).probabilities(discounts)
    rows = np.flatnonzero(~counted)
    expected = [by_hand(tuple(c[i] for c in contexts), values[i]) for i in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_no_context_shows_the_value_itself_or_the_future():
    """A change of one cell changes contexts of no cell before it; cells are in the order of time and voice."""
    rng = np.random.default_rng(0)
    cells = rng.integers(NUM_VALUES, size=(1, 12, 4))
    for contexts in bach_baselines.COUNTED.values():
        for time, voice in ((0, 0), (5, 2), (11, 3)):
            changed = cells.copy()
            changed[0, time, voice] = HOLD
            for other in range(4):
                before, after = (contexts(either, other) for either in (cells, changed))
                for old, new in zip(before, after, strict=True):
                    differs = np.flatnonzero((old != new)[0])
                    assert (4 * differs + other > 4 * time + voice).all()


def test_longer_contexts_predict_music_that_repeats_better():
    chord = [C_MAJOR, F_MAJOR, G_MAJOR, C_MAJOR]
    pieces = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        cells = chords(*(tuple(np.array(chord[i]) + seed % 3) for i in rng.permutation(4).tolist() * 8))
        pieces.append(Piece(f"bwv{seed}", cells, tuple(range(0, 8 * BAR, BAR))))
    train, val = pieces[:9], bach_data.windows(pieces[9:])
    ranges = bach_data.voice_ranges(train)
    bits = [
        sum(bach_baselines.count_bits(train, ranges, val, how)) for how in bach_baselines.COUNTED.values()
    ]
    assert bits[0] > 1.5 * bits[1] > 1.5 * bits[2]
    files = bach_baselines.file_bits(val)
    assert 0 < files["xz -9e"] < 32


@pytest.mark.parametrize(
    ("first", "then", "fifths", "octaves"),
    [
        ((72, 67, 64, 48), (74, 67, 64, 50), 0, 1),  # soprano and bass from C to D
        ((79, 76, 72, 48), (81, 77, 74, 50), 2, 1),  # fifths above tenor and bass, an octave of these
        ((79, 76, 71, 48), (79, 76, 71, 48), 0, 0),  # nobody moves
        ((79, 76, 71, 60), (81, 76, 71, 50), 0, 0),  # from a fifth to another in opposite directions
        ((79, 76, 71, 60), (81, 76, 71, 61), 0, 0),  # a fifth, then another interval
        ((67, 64, 60, 60), (69, 64, 62, 62), 2, 1),  # unisons count as octaves
    ],
)
def test_parallels_are_counted_by_hand(first, then, fifths, octaves):
    window = np.tile(chords(first, then, length=16), (2, 1))[None, :32]
    counts = bach_music.count_faults(window)
    assert counts["parallel fifths"] == 50 * fifths  # two bars
    assert counts["parallel octaves"] == 50 * octaves


def test_parallels_need_both_voices_before_and_after():
    cells = bach_data.encode([[(0, 4, 67), (8, 8, 69)], [], [], [(0, 4, 48), (8, 8, 50)]], 16)
    assert bach_music.count_faults(cells[None])["parallel fifths"] == 0


def test_crossings_and_notes_out_of_range_are_counted():
    voices = [
        [(0, 8, 72), (8, 8, 82 - 1)],
        [(0, 4, 74), (4, 4, 67), (8, 8, 54)],
        [(0, 16, 60)],
        [(0, 8, 39), (8, 8, 63)],
    ]
    counts = bach_music.count_faults(bach_data.encode(voices, 16)[None])
    assert counts["voice crossings"] == 300  # alto, tenor over alto, bass
    assert counts["out of range, soprano"] == 0
    assert counts["out of range, alto"] == 100
    assert counts["out of range, tenor"] == 0
    assert counts["out of range, bass"] == 200


def test_known_bars_are_found_also_where_a_note_is_held_into_them():
    train = bach_data.windows(PIECES[:1])
    unknown = bach_data.windows(PIECES[1:2])
    assert bach_music.share_known(train, train, 4) == 1
    assert bach_music.share_known(unknown, train, 1) == 0
    mixed = unknown[:1].copy()
    mixed[0, BAR : 2 * BAR] = train[0, 2 * BAR : 3 * BAR]
    assert bach_music.share_known(mixed, train, 1) == 1 / 4
    assert bach_music.share_known(mixed, train, 2) == 0
    held = mixed.copy()
    held[0, BAR - 4, 0], held[0, BAR, 0] = mixed[0, BAR, 0], HOLD
    assert bach_music.share_known(held, train, 1) == 1 / 4


def read_midi(data: bytes) -> list[list[tuple[int, int, int]]]:
    """The notes of a MIDI file as `decode` gives them, one list for each track that has some."""
    assert data[:4] == b"MThd"
    _, form, count, division = struct.unpack(">IHHH", data[4:14])
    assert (form, count) == (1, 5)
    at, voices = 14, []
    for _ in range(count):
        assert data[at : at + 4] == b"MTrk"
        end = at + 8 + struct.unpack(">I", data[at + 4 : at + 8])[0]
        at, time, begun, notes = at + 8, 0, {}, []
        while at < end:
            delta = 0
            while data[at] & 128:
                delta, at = delta << 7 | data[at] & 127, at + 1
            time, at = time + (delta << 7 | data[at]), at + 1
            status = data[at]
            if status == 0xFF:
                at += 3 + data[at + 2]
            elif status >> 4 == 0xC:
                at += 2
            else:
                pitch, at = data[at + 1], at + 3
                if status >> 4 == 9:
                    begun[pitch] = time
                else:
                    start = begun.pop(pitch)
                    notes.append((4 * start // division, 4 * (time - start) // division, pitch))
        assert at == end
        assert not begun
        voices.append(sorted(notes))
    assert at == len(data)
    return voices[1:]


def test_a_midi_file_holds_the_notes():
    cells = PIECES[0].cells.copy()
    cells[4:100, 2] = REST  # a rest that takes more than one byte
    assert read_midi(bach_music.midi_file(cells)) == bach_data.decode(cells)


def test_a_roll_has_each_note_in_its_voices_colour_and_marks_what_is_filled_in():
    cells = chords(C_MAJOR, F_MAJOR, length=16)
    plain, marked = (draw_rolls([("a", cells, filled)]) for filled in (None, (16, 32)))
    assert plain.size == marked.size
    for colour in COLOURS.values():
        columns = np.flatnonzero((np.array(plain) == ImageColor.getrgb(colour)).all(-1)[60:].any(0))
        assert columns.min() <= LEFT + 4
        assert columns.max() >= LEFT + 32 * CELL - 5
    columns = np.flatnonzero((np.array(marked) == ImageColor.getrgb(FILLED)).all(-1)[60:].any(0))
    assert columns.min() >= LEFT + 16 * CELL
    assert not (np.array(plain) == ImageColor.getrgb(FILLED)).all(-1).any()


def test_one_command_trains_measures_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bach, "run_main", run_here)
    monkeypatch.setattr(bach_data, "read_corpus", lambda limit: (PIECES[:18], {"odd": 2}))
    monkeypatch.setattr(bach, "SMOKE", {"pieces": 18, "windows": bach.BATCH, "passes": 1, "drawn": 2})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["bach.py", "--smoke", "--output_dir", str(out), "--device", "cpu"])
    bach.main()
    said = capsys.readouterr().out
    assert "18 chorales of 18 families; left out: odd: 2" in said
    scores = json.loads((out / "bach.json").read_text())
    assert scores["data"]["held_out_windows"] == 6
    for kind, row in (("ar", "FractalAR, exact"), ("mar", "FractalMAR, a bound")):
        bits = 4 * json.loads((out / f"nll-{kind}" / "nll.json").read_text())["bits_per_dim"]
        assert sum(scores["bits_per_sixteenth"][row]) == pytest.approx(bits)
        assert f"{bits:.3f}" in said
        assert sum(map(len, read_midi((out / f"new-{kind}-2.mid").read_bytes()))) > 4
    for number in (1, 2, 3):
        bars_1_and_4 = [
            [note for note in voice if sum(note[:2]) <= BAR or note[0] >= 3 * BAR]
            for name in ("bach", "result1")
            for voice in read_midi((out / f"filled-{number}-{name}.mid").read_bytes())
        ]
        assert bars_1_and_4[:4] == bars_1_and_4[4:]
        assert Image.open(out / f"filled-{number}.png").height > 3 * 100


def test_silence_can_be_drawn_and_written():
    silence = np.full((LENGTH, 4), REST, np.uint8)
    assert draw_rolls([("", silence, None)]).height > 100
    assert read_midi(bach_music.midi_file(silence)) == [[], [], [], []]
    assert set(bach_music.count_faults(silence[None]).values()) == {0}
