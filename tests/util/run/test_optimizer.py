"""Muon for the matrices of blocks, AdamW for the rest: what each updates, bad steps, and one state."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from conftest import tiny_model
from engine_fractalgen import Recipe, add_weight_decay, make_optimizer
from util.run.optimizer import is_matrix

RECIPE = Recipe(
    lr=1e-3, min_lr=0.0, lr_schedule="constant", warmup_epochs=0, epochs=1, grad_clip=3.0, optimizer="muon"
)


def with_gradients(seed: int = 0):
    """A tiny model with random gradients, and its optimiser."""
    model, generator = tiny_model("guided"), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model, make_optimizer(model, RECIPE)


def test_every_weight_is_in_one_group_with_the_published_decay():
    model, optimizer = with_gradients()
    decayed = set(add_weight_decay(model, 0.05)[1]["params"])
    grouped = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({p for p, _ in grouped}) == len(list(model.parameters()))
    assert all(decay == (0.05 if p in decayed else 0.0) for p, decay in grouped)


def test_matrices_of_blocks_take_muons_steps_and_the_rest_adamws():
    model, optimizer = with_gradients()
    names = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    optimizer.step()
    matrices = 0
    for name, (p, before) in names.items():
        if is_matrix(name, p):
            # orthogonal: all singular values near 1, times 0.2 sqrt(longer side), so that the RMS is AdamW's
            update = (before * (1 - 1e-3 * 0.05) - p.detach()) / (1e-3 * 0.2 * max(p.shape) ** 0.5)
            singular = torch.linalg.svdvals(update)
            assert singular.min() > 0.3, name
            assert singular.max() < 1.5, name
            matrices += 1
        elif p.dim() > 1:  # first step: the sign of the gradient
            torch.testing.assert_close(
                p.detach(), before * (1 - 1e-3 * 0.05) - 1e-3 * p.grad.sign(), rtol=1e-3, atol=1e-6
            )
    assert matrices > 8


def test_five_steps_are_those_of_torchs_own_muon():
    """torch computes in bfloat16, which has 8 bits of precision."""
    model, optimizer = with_gradients()
    names = dict(model.named_parameters())
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in names.items() if is_matrix(name, p)}
    theirs = torch.optim.Muon(
        list(copies.values()), lr=1e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    before = {name: p.detach().clone() for name, p in copies.items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for name, p in names.items():
            p.grad = torch.randn(p.shape, generator=generator)
            if name in copies:
                copies[name].grad = p.grad.clone()
        optimizer.step()
        theirs.step()
    for name, p in copies.items():
        moved, expected = names[name].detach() - before[name], p.detach() - before[name]
        assert (moved - expected).norm() < 0.02 * expected.norm(), name


def test_a_step_that_is_not_finite_changes_nothing():
    model, optimizer = with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(
        state["momentum_buffer"].any() for state in optimizer.state.values() if "momentum_buffer" in state
    )
    optimizer.found_inf = torch.tensor(0.0)
    next(model.parameters()).grad.fill_(1.0)
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_restored_optimizer_goes_on_with_the_same_bits():
    model, optimizer = with_gradients()
    optimizer.step()
    other, restored = with_gradients()
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(deepcopy(optimizer.state_dict()))  # it would share the tensors
    for both in (optimizer, restored):
        for group in both.param_groups:
            group["lr"] = 2e-3
        both.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def test_the_state_of_another_optimizer_is_refused():
    model, optimizer = with_gradients()
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(make_optimizer(model, replace(RECIPE, optimizer="adamw")).state_dict())
