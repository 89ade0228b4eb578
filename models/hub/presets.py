"""The named architectures (paper, 4.1 and appendix; docs/format.md, "Presets"), and a check of any."""

import json
from dataclasses import asdict, dataclass, field, replace

from models.generator import GENERATORS
from models.patches import Shape, as_shapes
from models.sampling.options import SamplingOptions
from util.errors import ArgumentError
from util.pixels import Alphabet, shape_name

# FractalGen's arguments that adapt a preset to other data, and with those that may then differ from it
ADAPTED = ("img_size_list", "channels", "num_values", "value_kind", "mean", "std")
CHOSEN = (*ADAPTED, "num_conds", "guiding_pixel")


@dataclass(frozen=True)
class Preset:
    """A named architecture and its sampling settings: the best published ones, for `tiny` models our own.

    lr        AdamW's learning rate of a tiny model on batches of 16; None: as published
    alphabet  arguments of `Alphabet`
    """

    sizes: tuple[int | Shape, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    generators: tuple[str, ...]
    num_conds: int
    guiding_pixel: bool
    steps: tuple[int, ...]
    guidance_scale: float
    temperature: float
    lr: float | None = None
    alphabet: dict = field(default_factory=dict)

    @property
    def arguments(self) -> dict:
        """FractalGen's arguments that the name decides, as JSON has them."""
        return {
            "img_size_list": [size if isinstance(size, int) else list(size) for size in self.sizes],
            "embed_dim_list": list(self.widths),
            "num_blocks_list": list(self.blocks), "num_heads_list": list(self.heads),
            "generator_type_list": list(self.generators), "num_conds": self.num_conds,
            "guiding_pixel": self.guiding_pixel, **self.alphabet,
        }  # fmt: skip

    @property
    def sampling_defaults(self) -> SamplingOptions:
        return SamplingOptions(self.steps, guidance_scale=self.guidance_scale, temperature=self.temperature)


_AR3, _MAR3, _MAR4 = ("ar",) * 3, ("mar", "mar", "ar"), ("mar", "mar", "mar", "ar")
_IN64, _IN256, _SEQ64 = (64, 4, 1), (256, 16, 4, 1), ((64,), 16, 4, 1)
_TOKENS = {"channels": 1, "value_kind": "categorical"}
PRESETS = {
    # sizes, widths, blocks, heads, generators, conditions, guiding pixel, steps, guidance, temperature, lr
    "fractalar_in64": Preset(
        _IN64, (1024, 512, 128), (32, 8, 3), (16, 8, 4), _AR3, 1, False, (64, 16), 11.0, 1.03),
    "fractalmar_in64": Preset(
        _IN64, (1024, 512, 128), (32, 8, 3), (16, 8, 4), _MAR3, 5, False, (64, 16), 6.5, 1.02),
    "fractalmar_base_in256": Preset(
        _IN256, (768, 384, 192, 64), (24, 6, 3, 1), (12, 6, 3, 4), _MAR4, 5, True, (64, 16, 16), 29.0, 1.1),
    "fractalmar_large_in256": Preset(
        _IN256, (1024, 512, 256, 64), (32, 8, 4, 1), (16, 8, 4, 4), _MAR4, 5, True, (64, 16, 16), 21.0, 1.1),
    "fractalmar_huge_in256": Preset(
        _IN256, (1280, 640, 320, 64), (40, 10, 5, 1), (16, 8, 4, 4), _MAR4, 5, True, (64, 16, 16), 19.0, 1.1),
    "fractalmar_tiny_in8": Preset(
        (8, 4, 1), (96, 64, 32), (1, 2, 1), (4, 4, 2), _MAR3, 5, False, (4, 16), 4.0, 1.2, 4e-3),
    "fractalar_tiny_in8": Preset(
        (8, 4, 1), (96, 64, 32), (1, 2, 1), (4, 4, 2), _AR3, 1, False, (4, 16), 4.0, 1.2, 4e-3),
    "fractalmar_tiny_in16": Preset(
        (16, 4, 1), (128, 96, 48), (3, 2, 1), (4, 4, 4), _MAR3, 5, False, (16, 16), 3.0, 1.0, 4e-3),
    "fractalar_tiny_in16": Preset(
        (16, 4, 1), (128, 96, 48), (3, 2, 1), (4, 4, 4), _AR3, 1, False, (16, 16), 3.0, 1.0, 4e-3),
    "fractalmar_tiny_in28": Preset(
        (28, 4, 1), (192, 96, 48), (4, 2, 1), (6, 4, 4), _MAR3, 5, False, (32, 16), 2.0, 1.0, 3e-3),
    "fractalar_tiny_in28": Preset(
        (28, 2, 1), (160, 64, 48), (4, 1, 1), (4, 4, 4), _AR3, 1, False, (196, 4), 1.5, 1.0, 4e-3),
    "fractalmar_tiny_in32": Preset(
        (32, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _MAR3, 5, False, (32, 16), 3.0, 1.0, 1.5e-3),
    "fractalmar_tiny_guided_in32": Preset(
        (32, 4, 1), (256, 128, 64), (5, 2, 1), (8, 4, 4), _MAR3, 5, True, (48, 16), 1.5, 1.7, 1.5e-3),
    "fractalar_tiny_in32": Preset(
        (32, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _AR3, 1, False, (64, 16), 3.0, 1.0, 1.5e-3),
    "fractalar_tiny_small_in32": Preset(
        (32, 2, 1), (160, 64, 48), (4, 1, 1), (4, 4, 4), _AR3, 1, False, (256, 4), 2.0, 1.1, 4e-3),
    "fractalmar_tiny_in64": Preset(
        (64, 8, 2, 1), (256, 128, 64, 64), (6, 3, 2, 1), (8, 4, 4, 4), _MAR4, 5, True, (32, 16, 4), 3.0, 1.0,
        1.5e-3),
    "fractalar_tiny_in64": Preset(
        (64, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _AR3, 1, False, (64, 16), 3.0, 1.0, 1.5e-3),
    "fractalmar_tiny_seq64": Preset(
        _SEQ64, (192, 128, 96, 64), (3, 2, 1, 1), (4, 4, 4, 4), _MAR4, 3, False, (4, 4, 4), 1.0, 1.0, 1.5e-3,
        _TOKENS),
    "fractalar_tiny_seq64": Preset(
        _SEQ64, (192, 128, 96, 64), (3, 2, 1, 1), (4, 4, 4, 4), ("ar",) * 4, 1, False, (4, 4, 4), 1.0, 1.0,
        1.5e-3, _TOKENS),
}  # fmt: skip


def find_preset(
    name: str, *, guiding_pixel: bool | None = None, num_conds: int | None = None, **data
) -> Preset:
    """The preset `name`, adapted to other `data`: those of ADAPTED that are not None and not its own.

    A preset that is adapted gives num_conds and guiding_pixel only where these are None, as far as the number
    of axes and the kind of values allow. Raises ValueError for an unknown name, and where a setting
    contradicts a preset that is not adapted.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {"guiding_pixel": guiding_pixel, "num_conds": num_conds}
    given = {setting: value for setting, value in given.items() if value is not None}
    own = {"img_size_list": preset.sizes, **asdict(Alphabet(**preset.alphabet))}
    data = {key: x for key, x in data.items() if x is not None and json.dumps(x) != json.dumps(own[key])}
    if not data:
        for setting, value in given.items():
            if value != (fixed := getattr(preset, setting)):
                raise ValueError(f"{setting} {value} contradicts model {name}, which has {setting} {fixed}")
        return preset
    sizes = tuple(data.pop("img_size_list", preset.sizes))
    if len(sizes) != (levels := len(preset.sizes)):
        raise ArgumentError("img_size_list", f"{list(sizes)} must have {levels} entries for model {name}")
    alphabet, shapes = {**preset.alphabet, **data}, as_shapes(sizes)
    fitting = {
        "num_conds": min(preset.num_conds, 1 + 2 * len(shapes[0])),
        "guiding_pixel": preset.guiding_pixel and Alphabet(**alphabet).is_ordinal,
        "steps": tuple(map(min, preset.steps, SamplingOptions.of_sizes(shapes).num_inference_steps)),
    }
    return replace(preset, sizes=sizes, alphabet=alphabet, **{**fitting, **given})


def check_architecture(
    sizes, widths, blocks, heads, generators, num_conds, guiding_pixel: bool, alphabet: Alphabet
) -> None:
    """Raises ValueError, naming the level, for a model that cannot be built (docs/format.md, "Presets")."""
    lists = {
        "img_size": sizes, "embed_dim": widths, "num_blocks": blocks, "num_heads": heads,
        "generator_type": generators,
    }  # fmt: skip
    if len(sizes) < 2 or len({len(entries) for entries in lists.values()}) != 1:
        lengths = ", ".join(f"{name}_list {len(entries)}" for name, entries in lists.items())
        raise ValueError(
            f"the lists need one entry for each level, the head last, and at least two; got {lengths}"
        )
    shapes = as_shapes(sizes)
    axes = len(shapes[0])
    if set(shapes[-1]) != {1}:
        raise ValueError(f"the last of img_size_list must be 1 (a pixel), got {sizes[-1]}")
    if generators[-1] != "ar":
        raise ValueError(
            f"the last of generator_type_list is the head and must be 'ar', got {generators[-1]!r}"
        )
    if not 1 <= num_conds <= 1 + 2 * axes:
        raise ValueError(f"num_conds must be from 1 to {1 + 2 * axes}, got {num_conds}")
    if guiding_pixel and not alphabet.is_ordinal:
        raise ValueError("guiding_pixel needs ordinal values: it is a mean, and categories have none")
    available = num_conds  # the class condition is repeated for level 0
    for level, kind in enumerate(generators[:-1]):
        if kind not in GENERATORS:
            raise ValueError(
                f"level {level}: unknown generator type {kind!r}; one of {', '.join(GENERATORS)}"
            )
        sides, patches = shapes[level], shapes[level + 1]
        fits = [patch >= 1 and side % patch == 0 for side, patch in zip(sides, patches, strict=True)]
        if not all(fits) or sides == patches:
            raise ValueError(
                f"level {level}: image side {shape_name(sides)} must be a multiple of patch side "
                f"{shape_name(patches)}"
            )
        needed = GENERATORS[kind].num_conds_in or num_conds
        if needed > available:
            raise ValueError(
                f"level {level}: num_conds {needed}, but the {generators[level - 1]} level above gives "
                f"{available}"
            )
        available = GENERATORS[kind].num_conds_out or 1 + 2 * axes
    for level, (width, depth, number) in enumerate(zip(widths, blocks, heads, strict=True)):
        if depth < 1:
            raise ValueError(f"level {level}: needs at least one block, got {depth}")
        if number < 1 or width < 1 or width % number:
            raise ValueError(
                f"level {level}: width {width} must be a multiple of the number of heads, {number}"
            )
