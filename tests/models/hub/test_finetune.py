"""Fine-tuning: what is taken of other weights."""

import pytest
import torch

from conftest import tiny_model
from models.hub import finetune
from models.hub.source import find
from util.errors import UserError


def saved(folder, kind="mar", names=("ant", "bee", "cat", "dog"), **changes):
    """Writes a model with random weights as a folder. Returns the model and its source."""
    model = tiny_model(kind, class_num=len(names), **changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape))
    model.class_names = names
    model.save_pretrained(folder)
    return model, find(folder)


def test_classes_are_taken_by_name_and_others_begin_as_no_class(tmp_path):
    model, source = saved(tmp_path)
    ours = tiny_model(class_num=3, attn_dropout=0.3)
    before = ours.class_emb.weight.detach().clone()
    lines = finetune.begin(ours, source, ("dog", "eel", "ant"))
    assert lines[1] == "classes: 2 of 4 taken by name, 1 begun anew"
    assert torch.equal(ours.class_emb.weight[[0, 2]], model.class_emb.weight[[3, 0]])
    assert torch.allclose(ours.class_emb.weight[1], before[1] + model.fake_latent[0])
    for name, weight in model.state_dict().items():
        assert name == "class_emb.weight" or torch.equal(ours.state_dict()[name], weight)


def test_without_names_as_many_classes_are_taken_by_number(tmp_path):
    model, source = saved(tmp_path)
    ours = tiny_model(class_num=4)
    assert finetune.begin(ours, source, None)[1] == "classes: 4 of 4 taken by number"
    assert torch.equal(ours.class_emb.weight, model.class_emb.weight)
    assert (
        finetune.begin(tiny_model(class_num=2), source, None)[1]
        == "classes: 0 of 4 taken by number, 2 begun anew"
    )


@pytest.mark.parametrize("kind", ["mar", "ar"])
def test_positions_of_level_0_are_interpolated(tmp_path, kind):
    _, source = saved(tmp_path, kind, img_size_list=[8, 2, 1])
    weights = source.weights()
    ours = tiny_model(kind, img_size_list=[16, 2, 1])
    positions = weights["generator.pos_embed_learned"]
    first = ours.generator.num_prefix if kind == "mar" else 0
    grid = torch.arange(4.0)
    # along y and x; torch's bicubic interpolation bends straight lines by up to 0.05
    positions[0, first : first + 16, 0] = grid.repeat_interleave(4)
    positions[0, first : first + 16, 1] = grid.repeat(4)
    resized = finetune.resize_positions(positions, None, ours.generator)
    assert resized.shape == ours.generator.pos_embed_learned.shape
    square = resized[0, first : first + 64, :2].view(8, 8, 2)
    expected = (torch.arange(8.0) + 0.5) / 2 - 0.5
    assert torch.allclose(square[3:5, 3:5, 0], expected[3:5, None].expand(2, 2), atol=0.05)
    assert torch.allclose(square[3:5, 3:5, 1], expected[3:5].expand(2, 2), atol=0.05)
    assert torch.equal(resized[:, :first], positions[:, :first])
    lines = finetune.begin(ours, source, ("ant", "bee", "cat", "dog"))
    assert "resized: positions of level 0, " in lines[2]


def test_a_weight_that_does_not_fit_is_begun_anew_and_named(tmp_path):
    _, source = saved(tmp_path, num_blocks_list=[2, 1, 2])
    lines = finetune.begin(tiny_model(), source, None)
    assert lines[-1].startswith("not used: next_fractal.next_fractal.blocks.1.")
    _, source = saved(tmp_path / "guided", "mar", num_conds=3)
    ours = tiny_model("mar", num_conds=5)
    assert finetune.begin(ours, source, None)[-1] == (
        "begun anew: generator.pos_embed_learned, next_fractal.generator.pos_embed_learned"
    )


def test_weights_of_quite_another_model_are_refused(tmp_path):
    _, source = saved(tmp_path, embed_dim_list=[16, 16, 16])
    with pytest.raises(UserError, match=r"--finetune .*model.safetensors: only [\d,]+ of [\d,]+ numbers fit"):
        finetune.begin(tiny_model(), source, None)
