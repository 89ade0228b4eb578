"""Refuses results that are not finite, and names the weight or the settings that made them so."""

from torch import Tensor, nn

from util.errors import UserError


def check_finite(model: nn.Module, results: Tensor, cause: str) -> None:
    """Raises UserError if a weight of `model` or a number in `results` is not finite.

    The message names the weight; where all weights are finite it is "<cause>, although all weights are
    finite". The weights are checked too, because results do not always show them: on a CPU, attention with
    queries that are NaN gives zeros. The host waits for the device once.
    """
    # One operation for all plain tensors, where parameters take one each. It also overflows above 1e19.
    norm = nn.utils.get_total_norm([weight.detach() for weight in model.parameters()])
    if norm.isfinite() & results.isfinite().all():  # sync
        return
    for name, weight in model.named_parameters():
        bad = weight[~weight.isfinite()]
        if len(bad):
            raise UserError(f"weight {name} of the model is not finite ({bad[0].item()}); load other weights")
    if not results.isfinite().all():
        raise UserError(f"{cause}, although all weights are finite")
