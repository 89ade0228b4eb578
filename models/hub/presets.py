"""The named architectures (paper, 4.1 and appendix; docs/format.md, "Presets"), and a check of any."""

from dataclasses import dataclass

from models.generator import GENERATORS
from models.sampling.options import SamplingOptions


@dataclass(frozen=True)
class Preset:
    """A named architecture and its sampling settings: the best published ones, for `tiny` models our own.

    lr  AdamW's learning rate of a tiny model on batches of 16; None: as published
    """

    sizes: tuple[int, ...]
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

    @property
    def arguments(self) -> dict:
        """FractalGen's arguments that the name decides, as JSON has them."""
        return {
            "img_size_list": list(self.sizes), "embed_dim_list": list(self.widths),
            "num_blocks_list": list(self.blocks), "num_heads_list": list(self.heads),
            "generator_type_list": list(self.generators), "num_conds": self.num_conds,
            "guiding_pixel": self.guiding_pixel,
        }  # fmt: skip

    @property
    def sampling_defaults(self) -> SamplingOptions:
        return SamplingOptions(self.steps, guidance_scale=self.guidance_scale, temperature=self.temperature)


_AR3, _MAR3, _MAR4 = ("ar",) * 3, ("mar", "mar", "ar"), ("mar", "mar", "mar", "ar")
_IN64, _IN256 = (64, 4, 1), (256, 16, 4, 1)
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
    "fractalmar_tiny_in32": Preset(
        (32, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _MAR3, 5, False, (32, 16), 3.0, 1.0, 1.5e-3),
    "fractalmar_tiny_guided_in32": Preset(
        (32, 4, 1), (256, 128, 64), (5, 2, 1), (8, 4, 4), _MAR3, 5, True, (48, 16), 1.5, 1.7, 1.5e-3),
    "fractalar_tiny_in32": Preset(
        (32, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _AR3, 1, False, (64, 16), 3.0, 1.0, 1.5e-3),
    "fractalmar_tiny_in64": Preset(
        (64, 8, 2, 1), (256, 128, 64, 64), (6, 3, 2, 1), (8, 4, 4, 4), _MAR4, 5, True, (32, 16, 4), 3.0, 1.0,
        1.5e-3),
    "fractalar_tiny_in64": Preset(
        (64, 4, 1), (256, 128, 64), (6, 3, 2), (8, 4, 4), _AR3, 1, False, (64, 16), 3.0, 1.0, 1.5e-3),
}  # fmt: skip


def find_preset(name: str, **given) -> Preset:
    """The preset `name`. Raises ValueError for an unknown one, and where a setting `given` contradicts it."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(PRESETS)}")
    for setting, value in given.items():
        fixed = getattr(PRESETS[name], setting)
        if value is not None and value != fixed:
            raise ValueError(f"{setting} {value} contradicts model {name}, which has {setting} {fixed}")
    return PRESETS[name]


def check_architecture(sizes, widths, blocks, heads, generators, num_conds) -> None:
    """Raises ValueError, naming the level, for a model that cannot be built (docs/format.md, "Presets")."""
    lists = {
        "img_size": sizes, "embed_dim": widths, "num_blocks": blocks, "num_heads": heads,
        "generator_type": generators,
    }  # fmt: skip
    if len(sizes) < 2 or len({len(entries) for entries in lists.values()}) != 1:
        lengths = ", ".join(f"{name}_list {len(entries)}" for name, entries in lists.items())
        raise ValueError(
            f"the lists need one entry for each level, the RGB head last, and at least two; got {lengths}"
        )
    if sizes[-1] != 1:
        raise ValueError(f"the last of img_size_list must be 1 (a pixel), got {sizes[-1]}")
    if generators[-1] != "ar":
        raise ValueError(
            f"the last of generator_type_list is the RGB head and must be 'ar', got {generators[-1]!r}"
        )
    if num_conds < 1:
        raise ValueError(f"num_conds must be at least 1, got {num_conds}")
    available = num_conds  # the class condition is repeated for level 0
    for level, kind in enumerate(generators[:-1]):
        if kind not in GENERATORS:
            raise ValueError(
                f"level {level}: unknown generator type {kind!r}; one of {', '.join(GENERATORS)}"
            )
        side, patch = sizes[level], sizes[level + 1]
        if patch < 1 or side % patch or side <= patch:
            raise ValueError(f"level {level}: image side {side} must be a multiple of patch side {patch}")
        needed = GENERATORS[kind].num_conds_in or num_conds
        if needed > available:
            raise ValueError(
                f"level {level}: num_conds {needed}, but the {generators[level - 1]} level above gives "
                f"{available}"
            )
        available = GENERATORS[kind].num_conds_out
    for level, (width, depth, number) in enumerate(zip(widths, blocks, heads, strict=True)):
        if depth < 1:
            raise ValueError(f"level {level}: needs at least one block, got {depth}")
        if number < 1 or width < 1 or width % number:
            raise ValueError(
                f"level {level}: width {width} must be a multiple of the number of heads, {number}"
            )
