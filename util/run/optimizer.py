"""Muon for the matrices of the transformer blocks and AdamW for everything else, as one optimiser."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)  # AdamW's, for every optimiser here
MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the polynomial that Jordan et al. 2024 chose for Muon
ITERATIONS = 5


def is_matrix(name: str, weight: nn.Parameter) -> bool:
    """Whether Muon updates a weight: a matrix of a transformer block, no embedding, position or head."""
    return weight.dim() == 2 and ".blocks." in f".{name}"


def orthogonalize(matrices: Tensor) -> Tensor:
    """Moves the singular values of N matrices (N, rows, columns) near 1, most of them between 0.7 and 1.2.

    A Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
    Computed in bfloat16 on a GPU, and in float32 elsewhere: without special units for it, bfloat16 made this
    take a quarter of a training step on a CPU.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon, and torch's fused AdamW, on groups of a model's weights, with one learning rate and one state.

    Muon's updates are scaled so that their root mean square is AdamW's (Liu et al. 2025, arXiv 2502.16982,
    section 2.2). Where `found_inf`, a tensor on the device, is not 0, a step changes nothing, as in fused
    AdamW; the host does not wait for it.
    """

    def __init__(self, model: nn.Module, groups: list[dict], lr: float):
        matrices = {p for name, p in model.named_parameters() if is_matrix(name, p)}
        split = lambda muon: [  # noqa: E731
            {**group, "params": kept, "muon": muon}
            for group in groups
            if (kept := [p for p in group["params"] if (p in matrices) == muon])
        ]
        self.adamw = torch.optim.AdamW(split(False), lr=lr, betas=BETAS, fused=True)
        super().__init__([*split(True), *self.adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Lets AdamW work on the groups and the state of this optimiser."""
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["muon"]:
                self._muon(group, found_inf)
        self.adamw.found_inf = found_inf
        self.adamw.step()

    def _muon(self, group: dict, found_inf: Tensor | None) -> None:
        """One step of Muon with Nesterov momentum on a group of matrices, those of one shape together."""
        alike = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[p.shape, p.device].append(p)
        for (shape, _), weights in alike.items():
            grads = torch.stack([p.grad for p in weights])
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = torch.stack([self.state[p]["momentum_buffer"] for p in weights])
            if found_inf is not None:
                grads = torch.where(found_inf > 0, momenta, grads)
            momenta.lerp_(grads, 1 - MOMENTUM)
            updates = orthogonalize(grads.lerp(momenta, MOMENTUM)) * (0.2 * math.sqrt(max(shape)))
            updates += group["weight_decay"] * torch.stack(weights)
            if found_inf is not None:
                updates *= found_inf == 0
            for p, momentum, update in zip(weights, momenta, updates, strict=True):
                self.state[p]["momentum_buffer"].copy_(momentum)
                p.sub_(update, alpha=group["lr"])
