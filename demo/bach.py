"""Trains and measures models of Bach's chorales: four voices on a grid of sixteenth notes.

    python demo/bach.py [--minutes 20] [--output_dir output/bach] [--smoke]

Reads the chorales of the package music21 (pip install -e '.[music]'; a minute, once) and runs
main_fractalgen.py: a FractalAR and a FractalMAR whose levels are bars, beats, sixteenths and voices. Prints
bits per sixteenth of held-out chorales, beside those of counts and of compressors, and how often drawn and
real music breaks the rules of harmony. Writes new pieces, and held-out chorales with bars 2 and 3 filled in
anew, as MIDI files and piano rolls, and all numbers to bach.json. A second call does not train again, but
goes on if training was stopped. See --retrain.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bach_baselines import COUNTED, count_bits, file_bits
from bach_data import (
    BAR,
    BARS,
    LENGTH,
    NUM_VALUES,
    VOICES,
    Piece,
    cut,
    families,
    load_corpus,
    save_windows,
    split,
    voice_ranges,
    windows,
)
from bach_music import count_faults, midi_file, share_known
from bach_roll import draw_rolls
from common import ROOT, add_device_flag, make_parser, plot_curve, run_main, save_png

from models.fractalgen import FractalGen
from util.errors import UserError, reading
from util.files import make_writable, write_json
from util.run.plan import duration

MODELS = {"ar": "fractalar_tiny_seq64", "mar": "fractalmar_tiny_seq64"}
NAMES = {"ar": "FractalAR", "mar": "FractalMAR"}
CELLS = f"--channels {len(VOICES)} --num_values {NUM_VALUES} --value_kind categorical --class_num 0"
BATCH = 16
TRAINING = (
    f"--no_flip --batch_size {BATCH} --lr 3e-3 --attn_dropout 0 --proj_dropout 0 --eval_freq 1 "
    "--save_last_freq 1 --save_every_steps 500"
)
PASSES = 16  # random orders of a window, where bits are a bound
DRAWN, SHOWN = 128, 3  # windows that each model draws, and how many of them are shown
FILLED = (BAR, 3 * BAR)  # sixteenths of bars 2 and 3
RESULTS = 2  # of each chorale that is filled in
SMOKE = {"pieces": 40, "windows": 256, "passes": 2, "drawn": 8}


@dataclass(frozen=True)
class Data:
    """Pieces to train on and held-out ones, the voices' ranges in the former, and the windows of either."""

    train: list[Piece]
    val: list[Piece]
    ranges: np.ndarray
    trained_on: np.ndarray
    held_out: np.ndarray


def prepare(folder: Path, smoke: bool) -> tuple[Data, dict]:
    """Reads the corpus and writes the windows to folder/data/train.npz and val.npz. Returns counts, too."""
    pieces, left_out = load_corpus(folder / "corpus.json", SMOKE["pieces"] if smoke else None)
    train, val = split(pieces)
    ranges = voice_ranges(train)
    limit = SMOKE["windows"] if smoke else None
    data = Data(train, val, ranges, windows(train, ranges)[:limit], windows(val))
    (folder / "data").mkdir(exist_ok=True)
    save_windows(folder / "data" / "train.npz", data.trained_on)
    save_windows(folder / "data" / "val.npz", data.held_out)
    counts = {
        "pieces": len(pieces), "left_out": left_out, "families": len(set(families(pieces))),
        "training_pieces": len(train), "held_out_pieces": len(val),
        "training_windows": len(data.trained_on), "held_out_windows": len(data.held_out),
    }  # fmt: skip
    reasons = ", ".join(f"{reason}: {number}" for reason, number in left_out.items())
    print(f"{len(pieces)} chorales of {counts['families']} families; left out: {reasons or 'none'}")
    print(f"training: {len(train)} chorales, {len(data.trained_on):,} windows of {BARS} bars, transposed")
    print(f"held out: {len(val)} chorales, {len(data.held_out)} windows", flush=True)
    return data, counts


def choose_epochs(model: str, data: Path, num_windows: int, minutes: float, device: str) -> int:
    """How many epochs take about the given time, by the step that --dry_run measures; at least one."""
    flags = f"--model {model} {CELLS} --batch_size {BATCH} --num_workers 0 --dry_run {device}"
    seconds = json.loads(run_main(flags, capture=True, quiet=True, data_path=data))["run"]["seconds"]
    if seconds is None:
        raise UserError(f"{model} needs more memory for a training step than is free")
    epoch = seconds * (num_windows // BATCH)
    epochs = max(1, round(60 * minutes / epoch))
    print(f"{model}: {duration(epoch)} an epoch, so {epochs} of them", flush=True)
    return epochs


def train_model(
    kind: str, folder: Path, num_windows: int, args: argparse.Namespace, device: str
) -> FractalGen:
    """Trains, or goes on where an earlier call was stopped; the epochs are chosen at the first call.

    Returns the model, which it writes as a folder.
    """
    run, data, plan = folder / f"run-{kind}", folder / "data", folder / f"plan-{kind}.json"
    if not plan.is_file():
        minutes = args.minutes / len(MODELS)
        epochs = 1 if args.smoke else choose_epochs(MODELS[kind], data, num_windows, minutes, device)
        write_json(plan, {"epochs": epochs})
    with reading(plan, "is damaged; --retrain begins anew"):
        epochs = json.loads(plan.read_text())["epochs"]
    flags = f"--model {MODELS[kind]} {CELLS} {TRAINING} --epochs {epochs} --num_workers 0 {device}"
    run_main(flags, data_path=data, output_dir=run, resume=run)
    plot_curve(run / "log.txt", f"{NAMES[kind]} on Bach's chorales", folder / f"loss-{kind}.png")
    model = FractalGen.from_pretrained(run)
    model.save_pretrained(folder / f"model-{kind}")
    return model


def model_bits(kind: str, folder: Path, passes: int, device: str) -> tuple[list[float], float]:
    """Bits per sixteenth of each voice of the held-out windows, and the standard error of their sum."""
    flags = f"--evaluate_nll --nll_forward_number {passes} --nll_bsz 32 --num_workers 0 {device}"
    model, output = folder / f"model-{kind}", folder / f"nll-{kind}"
    scores = json.loads(
        run_main(flags, capture=True, resume=model, data_path=folder / "data", output_dir=output)
    )
    (by_voice,) = scores["by_channel"].values()  # parts of a mean over voices and sixteenths
    voices = len(VOICES)
    return [voices * bits for bits in by_voice.values()], voices * scores["standard_error"]


def show_new(drawn: np.ndarray, kind: str, folder: Path) -> None:
    """Writes the first drawn windows as MIDI files, and below each other as a piano roll."""
    shown = list(enumerate(drawn[:SHOWN], 1))
    rolls = [(f"{NAMES[kind]}, new piece {number}", cells, None) for number, cells in shown]
    save_png(folder / f"new-{kind}.png", draw_rolls(rolls))
    for number, cells in shown:
        (folder / f"new-{kind}-{number}.mid").write_bytes(midi_file(cells))


def show_filled(model: FractalGen, pieces: list[Piece], folder: Path) -> None:
    """Fills in bars 2 and 3 of SHOWN held-out chorales; writes MIDI files and piano rolls."""
    mask = np.zeros(LENGTH, bool)
    mask[slice(*FILLED)] = True
    apart = -(-len(pieces) // SHOWN)  # neighbours may be versions of one chorale
    for number, piece in enumerate(pieces[::apart], 1):
        original = cut(piece.cells, piece.starts()[0])
        results = model.edit(original, mask, num_results=RESULTS, seed=number, progress_bar=False)
        rolls, files = [], {"bach": original}
        for i, cells in enumerate(results, 1):
            rolls.append((f"bars 2 and 3 by {NAMES['mar']}, result {i}", cells, FILLED))
            files[f"result{i}"] = cells
        rolls.append((f"as Bach wrote it, {piece.name.upper()}", original, None))
        save_png(folder / f"filled-{number}.png", draw_rolls(rolls))
        for name, cells in files.items():
            (folder / f"filled-{number}-{name}.mid").write_bytes(midi_file(cells))


def print_bits(rows: dict[str, list[float] | float], errors: dict[str, float]) -> None:
    """Prints bits per sixteenth: their sum, and each voice's where it is known."""
    print(f"\nbits per sixteenth, held out   {'all':>16}" + "".join(f"{voice:>9}" for voice in VOICES))
    for name, bits in rows.items():
        parts = bits if isinstance(bits, list) else []
        error = f" +- {errors[name]:.2f}" if name in errors else ""
        total = f"{sum(parts) if parts else bits:.3f}{error}"
        print(f"  {name:<34}{total:>13}" + "".join(f"{part:9.3f}" for part in parts))


def print_columns(title: str, columns: dict[str, dict[str, float]], number: str) -> None:
    """Prints a table whose columns are dicts with the same keys."""
    print(f"\n{title:<36}" + "".join(f"{name:>12}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"  {row:<34}" + "".join(f"{column[row]:>12{number}}" for column in columns.values()))


def main() -> None:
    parser = make_parser("bach.py", __doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, both models together")
    parser.add_argument("--output_dir", type=Path, help="default: output/bach, or output/bach-smoke")
    parser.add_argument("--smoke", action="store_true", help="see whether all works: few pieces, one epoch")
    parser.add_argument("--retrain", action="store_true", help="train again from the start")
    add_device_flag(parser)
    args = parser.parse_args()
    device = f"--device {args.device}" if args.device else ""
    passes, number = (SMOKE["passes"], SMOKE["drawn"]) if args.smoke else (PASSES, DRAWN)
    with parser.one_line_errors():
        if not 0 < args.minutes < math.inf:
            raise UserError(f"--minutes {args.minutes} must be above 0")
        default = ROOT / "output" / ("bach-smoke" if args.smoke else "bach")
        folder = make_writable(args.output_dir or default).resolve()
        began = time.perf_counter()
        data, counts = prepare(folder, args.smoke)
        print("counting what follows what, for the baselines", flush=True)
        bits = file_bits(data.held_out)
        bits |= {
            name: count_bits(data.train, data.ranges, data.held_out, how) for name, how in COUNTED.items()
        }
        music, errors = {"Bach": data.held_out}, {}
        for kind, name in NAMES.items():
            if args.retrain:
                shutil.rmtree(folder / f"run-{kind}", ignore_errors=True)
                (folder / f"plan-{kind}.json").unlink(missing_ok=True)
            model = train_model(kind, folder, len(data.trained_on), args, device)
            row = f"{name}, {'a bound' if kind == 'mar' else 'exact'}"
            bits[row], errors[row] = model_bits(kind, folder, passes, device)
            music[name] = model.generate(num_images=number, seed=0, progress_bar=False)
            show_new(music[name], kind, folder)
        show_filled(model, data.val, folder)  # by the MAR model: an AR model would not look at bar 4
    faults = {name: count_faults(cells) for name, cells in music.items()}
    known = {
        name: {f"{n} bar{'s' * (n > 1)}": share_known(cells, data.trained_on, n) for n in (1, 2, BARS)}
        for name, cells in music.items()
    }
    print_bits(bits, errors)
    print_columns("in 100 bars", faults, ".1f")
    print_columns("share that is in the training music", known, ".1%")
    scores = {"bits_per_sixteenth": bits, "standard_error": errors, "per_100_bars": faults, "known": known}
    write_json(folder / "bach.json", {"data": counts, **scores})
    print(f"\nin {folder}:")
    print("  new-ar.png, new-mar.png, new-*.mid     new pieces")
    print("  filled-*.png, filled-*.mid             held-out chorales with bars 2 and 3 filled in")
    print("  model-ar, model-mar, bach.json         the models, and all numbers")
    print(f"done in {duration(time.perf_counter() - began)}")


if __name__ == "__main__":
    main()
