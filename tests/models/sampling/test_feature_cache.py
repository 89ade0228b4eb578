"""The feature cache of level 0 of a MAR model, which makes sampling faster and approximate."""

import pytest
import torch
from test_canvas import LABELS, Picks

from conftest import opinionated, tiny_model
from models.sampling.mar import CachedAttention

STEPS = (16, 4)


def distributions(model, scale, interval):
    """Returns all distributions that the sampler draws from; the drawn values do not depend on them."""
    noise, met = model.noise(3, range(len(LABELS))), Picks()
    cond = model.class_emb(LABELS)
    cond = torch.cat([cond, model.fake_latent.repeat(len(LABELS), 1)]) if scale != 1 else cond
    model.sample(
        [cond] * model.num_conds, STEPS, scale, noise=noise, pick=met, feature_cache_interval=interval
    )
    return met.sorted()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_distributions_stay_close_and_closer_for_a_smaller_interval(scale):
    model = opinionated(tiny_model("mar", num_blocks_list=[3, 1, 1]))
    exact = distributions(model, scale, 1)
    away = [
        (distributions(model, scale, interval) - exact).abs().sum(-1).mean().item() / 2
        for interval in (2, 16)
    ]
    assert 0 < away[0] < 0.05
    assert away[0] < away[1]


def test_with_one_block_it_is_exact(monkeypatch):
    """Keys and values of the first block depend on one token only, so cached ones are never out of date."""
    model, used = opinionated(tiny_model("mar", num_blocks_list=[1, 1, 1])), []
    monkeypatch.setattr(
        CachedAttention, "__call__", lambda *args, f=CachedAttention.__call__: used.append(0) or f(*args)
    )
    torch.testing.assert_close(
        distributions(model, 3.0, 4), distributions(model, 3.0, 1), rtol=1e-4, atol=1e-5
    )
    assert len(used) == 16


def test_levels_of_another_type_and_bad_numbers_are_refused():
    for kind, interval in (("ar", 2), ("mar", 0)):
        model = tiny_model(kind)
        with pytest.raises(ValueError, match="feature_cache_interval"):
            model.sample([model.fake_latent] * model.num_conds, STEPS, feature_cache_interval=interval)
