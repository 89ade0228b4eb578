import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_model
from models import fractalgen
from models.fractalgen import FractalGen
from models.flops import (
    attention_entries,
    cost_report,
    forward_flops,
    parameters_by_level,
    sampling_cost,
    training_bytes,
    training_flops,
)
from models.generator import Mask
from models.mar import MARSampler
from models.noise import Noise
from models.pixelloss import PixelSampler
from models.sampler import LevelSampler

TABLE_1 = {"fractalmar_in64": (215, 208, 15), "fractalmar_large_in256": (215, 208, 419, 22)}  # GFLOPs, paper


def on_meta(*args, **kwargs) -> FractalGen:
    with torch.device("meta"):
        return FractalGen(*args, **kwargs)


def preset(name: str) -> FractalGen:
    with torch.device("meta"):
        return fractalgen.__dict__[name]()


@pytest.mark.parametrize("name", TABLE_1)
def test_forward_cost_is_the_papers_table_1(name):
    assert [f / 1e9 for f in forward_flops(preset(name))] == pytest.approx(TABLE_1[name], rel=0.02)


@pytest.mark.parametrize("kind", ["ar", "mar"])
def test_two_levels_cost_5516_gflops(kind):
    """64 px in one sequence of 4096 pixels, of the 64 px model's width and depth (paper, Table 1)."""
    model = on_meta([64, 1], [1024, 128], [32, 3], [16, 4], [kind, "ar"])
    assert sum(forward_flops(model)) / 1e9 == pytest.approx(5516, rel=0.02)


def test_256_px_cost_twice_64_px():
    small, large = (sum(forward_flops(preset(name))) for name in TABLE_1)
    assert large / small == pytest.approx(2, rel=0.02)


def test_attention_matrices_are_as_small_as_the_paper_says():
    report = cost_report(preset("fractalmar_base_in256"), 1, (1, 1, 1))["attention_matrix_entries"]
    assert report == {
        "one sequence of 256x256 pixels": 4_294_967_296,  # (256 ** 2) ** 2
        "level0": 256**2,
        "level1": 256 * 16**2,
        "level2": 1_048_576,  # 64 * 64 pictures of 4 x 4 pixels, (4 ** 2) ** 2 each
    }


def test_attention_is_counted_in_both_types_and_kernels(kind):
    assert attention_entries(tiny_model(kind)) == [16**2, 16 * 4**2]
    long = tiny_model(kind, img_size_list=[32, 2, 1])
    assert attention_entries(long) == [256**2, 256 * 4**2]


def test_training_flops_are_those_of_a_forward_pass(kind):
    """Held against the counter on a real model, whose levels hand down as many patches as on average."""
    model = tiny_model(kind, grad_checkpointing=True)
    going = {"ar": (16, 4), "mar over ar": (13, 4), "ar over mar": (16, 3)}.get(kind, (13, 3))
    masks, rows = [], 1
    for generator, patches in zip(model.generators, going, strict=True):
        length = generator.spec.num_patches
        random = Mask.of((torch.arange(length) < patches).expand(rows, -1))
        masks.append(random if patches < length else None)
        rows *= patches
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), masks=masks)
    assert sum(training_flops(model)) == counter.get_total_flops()
    assert len(training_flops(model)) == 3


def count_calls(monkeypatch, model: FractalGen) -> dict[str, int]:
    """Counts the trunks' runs by level, and those of the RGB heads."""
    calls = dict.fromkeys(["level0", "level1", "rgb", "guiding"], 0)
    for cls in {type(g.sampler(None, None)) if False else c for g in model.generators for c in LevelSampler.__subclasses__()}:
        plain = cls.predict

        def counted(self, *args, plain=plain):
            calls[f"level{self.generator.spec.index}"] += 1
            return plain(self, *args)

        monkeypatch.setattr(cls, "predict", counted)
    draw, start = PixelSampler.draw, MARSampler.start
    monkeypatch.setattr(PixelSampler, "draw", lambda *args: calls.update(rgb=calls["rgb"] + 1) or draw(*args))
    return calls


