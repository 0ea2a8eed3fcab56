"""The baseline: transformers' own grouped_mm experts with split adapters.

Split means that no W + scaling * B A is made: where transformers multiplies rows by the weights of
their experts, two more grouped products pass the same rows through A and B, and their result is
added in place. So do the fastest public trainers on top of torch's operators. Everything around it
(sort, gather, gate, routing weights, sum over experts) is `grouped_mm_experts_forward` of the
installed transformers, unchanged: only the linear layer that it calls is replaced for the call.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers.integrations import moe

from megablocks_utils.kernels.weights import LowRank


def forward_with_split_lora(
    experts: nn.Module, adapters: Mapping[str, LowRank]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the forward pass of transformers' `experts` with adapters by projection."""
    own_linear = moe._grouped_linear
    by_weight = {id(getattr(experts, name)): lora for name, lora in adapters.items()}

    def linear(rows: Tensor, weight: Tensor, offs: Tensor, **options) -> Tensor:
        output = own_linear(rows, weight, offs, **options)
        lora = by_weight[id(weight)]
        inner = grouped_mm(rows, lora.lora_a.transpose(1, 2), offs=offs) * lora.scaling
        return output.add_(grouped_mm(inner, lora.lora_b.transpose(1, 2), offs=offs))

    def forward(tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        moe._grouped_linear = linear
        try:
            return experts(tokens, top_k_index, top_k_weights)
        finally:
            moe._grouped_linear = own_linear

    return forward
