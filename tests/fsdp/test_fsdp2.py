"""What FSDP2 gathers again for the backward pass."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from megablocks_utils.fsdp.fsdp2 import needs_weights_in_backward


class ScaledEmbedding(nn.Embedding):
    """An embedding whose backward pass needs a weight, as Inkling's with its norm."""

    def __init__(self) -> None:
        super().__init__(16, 64)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * super().forward(ids)


def step_embedding(_rank: int) -> list[Tensor]:
    """With the scale freed after the forward pass, this process would die reading it."""
    embedding = ScaledEmbedding()
    model = nn.Sequential(embedding, nn.Linear(64, 8))
    for unit in (embedding, model):
        fully_shard(unit)
        unit.set_unshard_in_backward(needs_weights_in_backward(unit))
    model(torch.arange(16)).sum().backward()
    return [p.grad.full_tensor() for p in embedding.parameters()]


def test_an_embedding_with_a_scale_of_its_own_has_its_weights_in_backward(ranks1):
    assert not needs_weights_in_backward(nn.Embedding(16, 64))
    assert all(grad.norm() > 0 for grad in ranks1.run(step_embedding)[0])
