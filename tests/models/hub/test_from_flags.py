"""What the flags mean for a model."""

from pathlib import Path

import pytest

from models.fractalgen import PRESETS
from models.hub.classes import imagenet_names
from models.hub.from_flags import choose_preset, settle
from models.hub.source import Source
from models.sampling.guidance import SCHEDULES
from util.errors import UserError
from util.flags import get_args_parser
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


def test_a_number_of_classes_that_is_none_is_named():
    with pytest.raises(UserError, match=r"config.json: class_num 'many' must be a whole number"):
        settled(config={**PRESETS["fractalmar_tiny_in8"].arguments, "class_num": "many"})
