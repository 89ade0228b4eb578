import pytest
import torch

from conftest import tiny_model
from models import fractalgen
from models.flops import cost_report, forward_flops, training_bytes

TABLE_1 = {"fractalmar_in64": (215, 208, 15), "fractalmar_large_in256": (215, 208, 419, 22)}  # GFLOPs, paper


@pytest.mark.parametrize("name", TABLE_1)
def test_forward_cost_is_the_papers_table_1(name):
    with torch.device("meta"):
        model = fractalgen.__dict__[name]()
    assert [f / 1e9 for f in forward_flops(model)] == pytest.approx(TABLE_1[name], rel=0.02)


def test_activations_are_what_the_backward_pass_keeps():
    model = tiny_model("mar", attn_dropout=0.0, proj_dropout=0.0).train()
    plain = training_bytes(model, 4)
    assert plain["activations"] == 4 * training_bytes(model, 1)["activations"]
    less = training_bytes(tiny_model("mar", grad_checkpointing=True), 4)
    assert less["activations"] < 0.7 * plain["activations"]
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert plain["weights, gradients, moments"] == 4 * weights
    assert all(not p.is_meta for p in model.parameters())


def test_report_counts_the_published_parameters():
    with torch.device("meta"):
        report = cost_report(fractalgen.fractalmar_base_in256(), 2)
    assert report["parameters"] == 186_300_224
    assert list(report["forward_gflops_per_picture"]) == ["level0", "level1", "level2", "rgb"]
