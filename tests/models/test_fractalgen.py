"""The recursion, the table of models, and properties that hold for all combinations of generators."""

import copy

import pytest
import torch

from conftest import random_values, tiny_model
from models import fractalgen
from models.fractalgen import PRESETS, FractalGen
from util.pixels import RGB

LABELS = torch.tensor([0, 3, 1])


def images(size: int = 8) -> torch.Tensor:
    return RGB.normalize(random_values(3, size))


def test_likelihood_of_an_ar_model_is_the_product_of_the_samplers_conditionals():
    """Makes the sampler draw the image's values, and multiplies the probabilities of these draws."""
    model, x = tiny_model("ar"), images()
    logs, forced = [], iter([])

    def pick(probs, uniforms):
        values = next(forced)
        logs.append(probs.gather(1, values[:, None]).squeeze(1).double().log())
        return values

    values = RGB.to_values(x)  # the sampler goes through level 0's patches, their pixels, and R, G, B
    blocks = values.view(3, 3, 4, 2, 4, 2).permute(2, 4, 3, 5, 1, 0).reshape(-1, 3)
    forced = iter(blocks)
    drawn = model.sample([model.fake_latent.repeat(3, 1)], (16, 4), pick=pick)
    assert torch.equal(RGB.to_values(drawn), values)
    brute = -torch.stack(logs).sum(0).mean() / (3 * 8 * 8)
    loss = model(x, LABELS)  # evaluation: the mean over pixels and channels, unconditional
    torch.testing.assert_close(loss.double(), brute, rtol=1e-5, atol=0)


def test_every_weight_gets_a_gradient(kind):
    model = tiny_model(kind).train()
    model(images(), LABELS, label_drop=torch.tensor([True, False, False])).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


def test_without_classes_the_condition_is_always_the_fake_latent(kind):
    """This holds in training too. The empty table of classes requires no gradient, else DDP would wait."""
    model, same = (tiny_model(kind, class_num=n, attn_dropout=0.0, proj_dropout=0.0).train() for n in (0, 4))
    assert model.class_emb.weight.shape == (0, 32)
    model.load_state_dict({**same.state_dict(), "class_emb.weight": model.class_emb.weight})
    masks = model.draw_masks(model.noise(0, range(3)), train=True)
    settings = dict(masks=masks, dither=0.0)
    loss = model(images(), torch.zeros(3, dtype=torch.int64), label_drop=torch.zeros(3).bool(), **settings)
    assert torch.equal(loss, same(images(), LABELS, label_drop=torch.ones(3).bool(), **settings))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["class_emb.weight"]
    assert not model.class_emb.weight.requires_grad


def test_checkpointing_changes_nothing(kind):
    results = []
    for checkpointing in (False, True):
        model = tiny_model(kind, grad_checkpointing=checkpointing, attn_dropout=0.0, proj_dropout=0.0).train()
        masks = model.draw_masks(model.noise(0, range(3)), train=True)
        loss = model(images(), LABELS, masks=masks, label_drop=torch.zeros(3).bool(), dither=0.0)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_sampling_leaves_the_model_as_it_was_also_when_interrupted(kind):
    model = tiny_model(kind).train()
    model.generator.eval()  # a module in another mode than the model must stay so
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]

    def interrupt(step, num_steps, canvas):
        if step == 1:
            raise KeyboardInterrupt

    settings = dict(guidance_scale=2.0, seed=0, progress_bar=False)
    model.generate([0, 1], **settings)
    with pytest.raises(KeyboardInterrupt):
        model.generate([0, 1], callback_on_step_end=interrupt, **settings)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m.training for m in model.modules()] == modes
    assert [sorted(vars(m)) for m in model.modules()] == attributes


def test_state_dict_round_trip_is_strict(kind):
    model, other = tiny_model(kind), tiny_model(kind)
    torch.nn.init.normal_(other.fake_latent)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.fake_latent, model.fake_latent)


def test_evaluation_is_unconditional_and_training_drops_labels_at_the_given_rate():
    model = tiny_model("ar")
    assert torch.equal(model(images(), LABELS), model(images(), LABELS * 0))
    assert not torch.equal(
        model(images(), LABELS, label_drop=torch.zeros(3).bool()),
        model(images(), LABELS * 0, label_drop=torch.zeros(3).bool()),
    )
    always = tiny_model("ar", label_drop_prob=1.0, proj_dropout=0.0).train()
    never = tiny_model("ar", label_drop_prob=0.0, proj_dropout=0.0).train()
    assert torch.equal(always(images(), LABELS), always(images(), LABELS * 0))
    assert not torch.equal(never(images(), LABELS), never(images(), LABELS * 0))


def test_the_loss_is_the_sum_of_its_terms_with_red_weighted_in_training():
    model = tiny_model("guided", r_weight=3.0)
    for train in (False, True):
        loss, terms = model(images(), LABELS, train=train, return_terms=True)
        assert [term.name for term in terms] == ["guiding1", "rgb"]
        weights = [5.0, 3.0] if train else [1.0, 1.0]
        parts = [
            (w * t.nll[:, 0] + t.nll[:, 1] + t.nll[:, 2]).mean() / (w + 2)
            for w, t in zip(weights, terms, strict=True)
        ]
        torch.testing.assert_close(loss, sum(parts))


@pytest.mark.parametrize(
    "sizes",
    [[8, 1], [8, 4, 2, 1], [9, 3, 1], [16, 8, 4, 2, 1]],
    ids=str,
)
@pytest.mark.parametrize("kind", ["ar", "mar"])
def test_any_depth_from_data_alone(sizes, kind):
    depth = len(sizes)
    model = FractalGen(sizes, [16] * depth, [1] * depth, [2] * depth, [kind] * (depth - 1) + ["ar"],
                       class_num=4, num_conds=1 if kind == "ar" else 5, guiding_pixel=kind == "mar")  # fmt: skip
    assert model(RGB.normalize(random_values(2, sizes[0])), torch.tensor([0, 1])).isfinite()
    drawn = model.generate([1], seed=0, num_inference_steps=[2] * (depth - 1), progress_bar=False)
    assert drawn[0].size == (sizes[0], sizes[0])


BAD = {
    "sizes that do not divide": (dict(img_size_list=[8, 3, 1]), "level 0: image side 8 must be a multiple of patch side 3"),
    "no pixel level": (dict(img_size_list=[8, 4, 2]), "must be 1"),
    "a patch as large as its image": (dict(img_size_list=[8, 8, 1]), "level 0"),
    "an unknown generator": (dict(generator_type_list=["mar", "gan", "ar"]), "unknown generator type 'gan'; one of ar, mar"),
    "an RGB head of another type": (dict(generator_type_list=["mar", "mar", "mar"]), "is the head and must be"),
    "lists of different length": (dict(num_blocks_list=[1, 1]), "num_blocks_list 2"),
    "heads that do not divide": (dict(num_heads_list=[3, 2, 2]), "level 0: width 32"),
    "an ar width without pairs": (dict(generator_type_list=["ar"] * 3, num_conds=1, embed_dim_list=[6, 16, 16]), "an ar level's width"),
    "a level without blocks": (dict(num_blocks_list=[1, 1, 0]), "level 2: needs at least one block"),
    "a level without width": (dict(embed_dim_list=[32, 0, 16]), "level 1: width 0"),
    "conditions that are not there": (dict(generator_type_list=["ar", "mar", "ar"], num_conds=5), "level above gives 1"),
    "too many conditions": (dict(num_conds=6), "num_conds must be from 1 to 5, got 6"),
    "no condition": (dict(num_conds=0), "num_conds"),
    "more conditions than a patch and its neighbours": (dict(img_size_list=[(8,), 2, 1], num_conds=4), "num_conds must be from 1 to 3, got 4"),
    "a mean of categories": (dict(guiding_pixel=True, value_kind="categorical"), "guiding_pixel needs ordinal values"),
    "patches that do not divide an axis": (dict(img_size_list=[(4, 6), (2, 4), 1]), "level 0: image side 4x6 must be a multiple of patch side 2x4"),
    "a rectangle as large as its image": (dict(img_size_list=[(4, 6), (4, 6), 1]), "level 0"),
    "a last size that is no cell": (dict(img_size_list=[(4, 6), (2, 3), (1, 3)]), "the last of img_size_list must be 1"),
    "mixed numbers of axes": (dict(img_size_list=[(4, 6), (2,), 1]), "as many in every entry"),
    "four axes": (dict(img_size_list=[(4,) * 4, (2,) * 4, 1]), "one to 3 axes"),
    "no axis": (dict(img_size_list=[(), (), ()]), "one to 3 axes"),
    "an ar width without 3-D pairs": (dict(generator_type_list=["ar"] * 3, num_conds=1, img_size_list=[(4, 2, 2), (2, 1, 1), 1], embed_dim_list=[8, 16, 16]), "level 0: an ar level's width must be .*at least 6"),
    "no channel": (dict(channels=0), "channels 0 must be from 1 to 4096"),
    "one value": (dict(num_values=1), "num_values 1 must be from 2 to 65536"),
    "too many values": (dict(num_values=2**16 + 1), "num_values 65537 must be from 2 to 65536"),
    "an unknown kind of values": (dict(value_kind="words"), "value_kind 'words' must be one of ordinal, categorical"),
    "means of another number of channels": (dict(mean=[0.5]), "must be 3 numbers, one for each channel"),
    "no spread": (dict(std=[1.0, 0.0, 1.0]), "and above 0"),
    "means of categories": (dict(value_kind="categorical", mean=[0.1] * 3), "mean is for ordinal values"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_configuration_that_cannot_work_is_an_error_at_construction(bad):
    changes, message = BAD[bad]
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model("mar", **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_consistent(name):
    with torch.device("meta"):
        model = fractalgen.__dict__[name](class_num=5)
    assert model.class_emb.num_embeddings == 5
    assert len(model.sampling_defaults.num_inference_steps) == len(model.generators)
    with pytest.raises(ValueError, match=f"contradicts model {name}"):
        fractalgen.__dict__[name](num_conds=4)
    with pytest.raises(ValueError, match="guiding_pixel"):
        fractalgen.__dict__[name](guiding_pixel=not PRESETS[name].guiding_pixel)


BEST = {  # guidance scale, temperature, steps: docs/format.md, "Presets"
    "fractalar_in64": (11.0, 1.03, (64, 16)),
    "fractalmar_in64": (6.5, 1.02, (64, 16)),
    "fractalmar_base_in256": (29.0, 1.1, (64, 16, 16)),
    "fractalmar_large_in256": (21.0, 1.1, (64, 16, 16)),
    "fractalmar_huge_in256": (19.0, 1.1, (64, 16, 16)),
}


@pytest.mark.parametrize("name", BEST)
def test_generate_uses_the_best_published_settings(name):
    with torch.device("meta"):
        found = fractalgen.build(name).sampling_defaults
    assert (found.guidance_scale, found.temperature, found.num_inference_steps) == BEST[name]
    assert (found.guidance_schedule, found.filter_threshold) == ("linear", 1e-4)


def test_published_construction_and_sampling_call():
    model = fractalgen.__dict__["fractalmar_tiny_in8"](guiding_pixel=False, num_conds=5).eval()
    emb = torch.cat([model.class_emb(torch.tensor([3, 7])), model.fake_latent.repeat(2, 1)])
    drawn = model.sample(cond_list=[emb] * 5, num_iter_list=(4, 2), cfg=4.0, cfg_schedule="constant", temperature=1.02,
                         filter_threshold=1e-4, fractal_level=0, visualize=False)  # fmt: skip
    assert drawn.shape == (2, 3, 8, 8)
    values = RGB.to_values(drawn)
    torch.testing.assert_close(RGB.normalize(values), drawn)
