"""What the flags mean for a model."""

import json
from pathlib import Path

import pytest

from models import fractalgen
from models.fractalgen import PRESETS
from models.hub.classes import imagenet_names
from models.hub.from_flags import choose_preset, settle
from models.hub.presets import CHOSEN
from models.hub.source import Source
from models.sampling.guidance import SCHEDULES
from util.errors import UserError
from util.flags import get_args_parser
from util.pixels import RGB
from util.run.recipe import LR_SCHEDULES


def settled(*words: str, config: dict | None = None):
    args = get_args_parser("", tuple(PRESETS), tuple(SCHEDULES), tuple(LR_SCHEDULES)).parse_args(words)
    source = None if config is None else Source(Path("weights"), config, Path("config.json"))
    choose_preset(args, source)
    settle(args, source, {}, processes=1)
    return args


def test_names_of_classes_are_those_of_the_weights_or_imagenets():
    names = {**PRESETS["fractalmar_tiny_in8"].arguments, "class_num": 2, "class_names": ["cat", "dog"]}
    args = settled("--class_labels", "dog,0", config=names)
    assert (args.model, args.class_num, args.class_labels) == ("fractalmar_tiny_in8", 2, [1, 0])
    goldfish = imagenet_names().index("goldfish")
    assert settled("--class_labels", "goldfish").class_labels == [goldfish]
    for words in (("--class_num", "999"), ("--model", "fractalmar_tiny_in32")):
        with pytest.raises(UserError, match="--class_labels 'goldfish' is no class"):
            settled("--class_labels", "goldfish", *words)


def test_an_architecture_without_a_name_needs_one():
    with pytest.raises(UserError, match=r"config.json: its architecture is that of no --model NAME"):
        settled(config={"img_size_list": [8, 1]})


def test_without_anything_it_is_the_published_default():
    args = settled()
    assert (args.model, args.class_num, args.img_size, args.ema) == ("fractalmar_in64", 1000, 64, None)


def test_flags_adapt_a_preset_to_other_data():
    line = settled("--model", "fractalmar_tiny_in8", "--img_size_list", "12x,2,1", "--channels", "2")
    assert (line.img_size_list, line.img_size, line.channels, line.num_conds) == ([[12], 2, 1], None, 2, 3)
    assert line.mean == (0.5, 0.5)
    grey = settled(
        "--model", "fractalmar_tiny_in8", "--channels", "1", "--num_values", "17", "--img_size", "8"
    )
    assert (grey.img_size, grey.num_values, grey.guiding_pixel) == (8, 17, False)
    for words, message in (
        ("--img_size 8 --img_size_list 12x8,2,1", "--img_size 8 contradicts --model .*, which has 12x8"),
        ("--num_values 1", "--num_values 1 must be from 2 to 65536"),
        ("--img_size_list 8,1", r"--img_size_list \[8, 1\] must have 3 entries"),
        ("--channels 1 --img_size 9", "--img_size 9 contradicts"),
    ):
        with pytest.raises(UserError, match=message):
            settled("--model", "fractalmar_tiny_in8", *words.split())


def test_a_resumed_or_finetuned_model_keeps_its_sizes_and_alphabet():
    own = fractalgen.build(
        "fractalmar_tiny_in8", img_size_list=[[12], 2, 1], channels=2, mean=[0.1, 0.2], num_conds=2
    )
    args = settled(config=json.loads(json.dumps(own.config)))
    assert args.model == "fractalmar_tiny_in8"
    assert fractalgen.build(args.model, **{name: getattr(args, name) for name in CHOSEN}).config == {
        **own.config, "std": [0.25, 0.25]
    }  # fmt: skip
    assert (
        settled("--model", "fractalmar_tiny_in8", config=own.config).channels == 3
    )  # another model, begun with these


@pytest.mark.parametrize(
    ("words", "mean"),
    [
        ("", (0.1,)),
        ("--channels 1 --num_values 17 --value_kind ordinal", (0.1,)),
        ("--channels 3", RGB.mean),
        ("--value_kind categorical", (0.0,)),
    ],
)
def test_a_mean_is_not_taken_over_for_other_cells(words, mean):
    grey = fractalgen.build("fractalmar_tiny_in8", channels=1, mean=[0.1])
    assert settled(*words.split(), config=json.loads(json.dumps(grey.config))).mean == mean


def test_a_number_of_classes_that_is_none_is_named():
    with pytest.raises(UserError, match=r"config.json: class_num 'many' must be a whole number"):
        settled(config={**PRESETS["fractalmar_tiny_in8"].arguments, "class_num": "many"})
