"""Looking inside: the softmaxes are those that the sampler drew from, and the steps those in which it did."""

import pytest
import torch
from charts import bar_chart, heat_map, outline
from test_bits import Forced, no_ties

from conftest import TINY, random_values, swayed, tiny_model
from models.likelihood.inside import look_inside
from models.sampling.guidance import Guidance
from util.pixels import RGB

FOUR = dict(
    img_size_list=[8, 4, 2, 1],
    embed_dim_list=[32, 16, 16, 16],
    num_blocks_list=[1] * 4,
    num_heads_list=[2] * 4,
)
FOUR |= dict(generator_type_list=["mar", "mar", "mar", "ar"])
MODELS = {**{kind: (kind, {}) for kind in TINY}, "guided, four levels": ("guided", FOUR)}


@pytest.mark.parametrize("name", MODELS)
def test_entropies_and_softmaxes_are_those_the_sampler_draws_from(name, monkeypatch):
    kind, changes = MODELS[name]
    model, levels = swayed(tiny_model(kind, **changes)), no_ties(random_values(1, 8))
    steps, seen = (2,) * len(model.generators), []
    plain = Guidance.probabilities

    def watched(self, logits, log_weights=None):
        seen.append(plain(self, logits, log_weights))
        return seen[-1]

    forced = Forced(model, levels)
    with monkeypatch.context() as patched:
        patched.setattr(Guidance, "probabilities", watched)
        drawn = model.sample([model.fake_latent] * model.num_conds, steps, noise=forced.noise, pick=forced)
    assert torch.equal(RGB.to_values(drawn), levels.long())
    probs = torch.cat(seen)  # every row of every softmax, in the order of drawing
    own = -(probs * probs.clamp(min=1e-30).log2()).sum(-1)

    inside = look_inside(model, levels, (5, 2), num_inference_steps=steps, seed=0)
    found = []
    for place, entropy, size in zip(inside.places, inside.entropy, model.img_size_list[1:], strict=True):
        one = entropy[:, ::size, ::size]  # of each patch
        assert torch.equal(one.repeat_interleave(size, 1).repeat_interleave(size, 2), entropy)
        assert (place.entropy is None) == (entropy == 0).all()
        if place.entropy is not None:
            found.append(one.flatten())
            assert torch.allclose(place.entropy, entropy[:, 2, 5], atol=1e-5)
            assert all((probs - row).abs().amax(1).min() < 1e-5 for row in place.probs)
    assert torch.allclose(torch.cat(found).sort().values, own.sort().values, atol=1e-4)
    assert inside.places[-1].values.tolist() == levels[0, :, 2, 5].tolist()


def test_steps_known_pixels_and_neighbours_follow_the_canvas():
    model = swayed(tiny_model("mar"))
    known = torch.zeros(8, 8, dtype=torch.bool)
    canvases = []
    image = model.generate(
        [1], num_inference_steps=(5, 3), seed=2, guidance_scale=1.0, progress_bar=False,
        callback_on_step_end=lambda step, num_steps, canvas: canvases.append(canvas[0]),
    )  # fmt: skip
    place = look_inside(model, image, (1, 4), 1, num_inference_steps=(5, 3), seed=2).places[0]
    assert place.num_steps == len(canvases)
    if place.step:
        known = (canvases[place.step - 1] != 0).any(0)
    assert torch.equal(place.known, known)
    assert (canvases[place.step][:, 4:6, 0:2] == canvases[-1][:, 4:6, 0:2]).all()
    assert (place.image, place.patch) == ((0, 0, 8, 8), (0, 4, 2, 2))
    assert place.neighbours == ((0, 2, 2, 2), (2, 4, 2, 2), (0, 6, 2, 2), None)
    inner = look_inside(model, image, (1, 4), 1, seed=2).places[1]
    assert (inner.image, inner.patch, inner.neighbours) == ((0, 4, 2, 2), (1, 4, 1, 1), ())


def test_maps_outlines_and_charts():
    values = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    shown = heat_map(values)
    bright = [sum(shown.getpixel((x, y))) for y in (0, 1) for x in (0, 1)]
    assert bright == sorted(bright)
    assert heat_map(values, high=8).getpixel((1, 1)) == shown.getpixel((0, 1))
    marked = outline(shown, [((1, 0, 1, 1), "red")], side=20)
    assert marked.size == (20, 20)
    assert marked.getpixel((10, 0)) == (255, 0, 0)
    assert marked.getpixel((9, 0)) == shown.getpixel((0, 0))
    probs = torch.full((3, 256), 1e-3)
    probs[:, 200] = 0.7
    chart = bar_chart(probs, [200, 200, 10])
    assert [chart.getpixel((400, channel * 74 + 20)) != (255, 255, 255) for channel in range(3)] == [True] * 3
    assert [chart.getpixel((401, channel * 74 + 70)) == (0, 0, 0) for channel in range(3)] == [
        True,
        True,
        False,
    ]
