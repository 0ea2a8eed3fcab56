"""Stock torch optimizers of a reference run: AdamW for everything, or Muon for whole matrices."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_NOT_HIDDEN = ("embed_tokens", "lm_head")  # "Other parameters, such as bias, and embedding": AdamW
_ROUTERS = ("mlp.gate.weight", "mlp.router.weight")  # of the tiny families


def build_stock_optimizers(
    parameters: Mapping[str, nn.Parameter],
    split: Callable[[str, Tensor], list[Tensor]],
    *,
    uses_muon: bool,
    learning_rate: float,
    weight_decay: float,
) -> list[Optimizer]:
    """Return AdamW, behind torch's own Muon where that is asked for.

    Torch's Muon takes nothing but two dimensions: experts are given to it one matrix at a time,
    each a view of the parameter, which is so updated in place.

    Args:
        parameters: what is trained.
        split: gives the matrices of a parameter, as views.
        uses_muon: whether Muon trains the matrices between embedding and head but the routers'.
        learning_rate: of both.
        weight_decay: of matrices; norms are not decayed.
    """
    hidden = {n: p for n, p in parameters.items() if uses_muon and _is_hidden(n, split(n, p))}
    rest = [p for n, p in parameters.items() if n not in hidden]
    groups = [
        {"params": found, "weight_decay": decay}
        for found, decay in (
            ([p for p in rest if p.dim() > 1], weight_decay),
            ([p for p in rest if p.dim() == 1], 0.0),
        )
        if found
    ]
    optimizers: list[Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, foreach=False))
    if hidden:
        optimizers.insert(0, _build_muon(hidden, split, learning_rate, weight_decay))
    return optimizers


def _is_hidden(name: str, matrices: list[Tensor]) -> bool:
    if name.endswith("bias") or name.endswith(_ROUTERS):
        return False
    is_matrix = all(m.dim() == 2 and min(m.shape) > 1 for m in matrices)
    return is_matrix and not any(part in name for part in _NOT_HIDDEN)


def _build_muon(
    hidden: Mapping[str, nn.Parameter],
    split: Callable[[str, Tensor], list[Tensor]],
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Muon:
    pieces = {n: [nn.Parameter(m) for m in split(n, p.detach())] for n, p in hidden.items()}
    flat = [piece for found in pieces.values() for piece in found]
    muon = torch.optim.Muon(flat, lr=learning_rate, weight_decay=weight_decay)

    def pairs() -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, parameter in hidden.items():
            assert parameter.grad is not None, name
            yield from zip(pieces[name], split(name, parameter.grad), strict=True)

    def give_gradients(*_ignored: object) -> None:
        for piece, gradient in pairs():
            piece.grad = gradient

    muon.register_step_pre_hook(give_gradients)
    return muon
