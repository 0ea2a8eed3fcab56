"""Low-rank adapters of one projection of all experts of a layer."""

from torch import Tensor, nn

from megablocks_utils.kernels.weights import LowRank
from megablocks_utils.mesh.placement import local_tensor


class ExpertLora(nn.Module):
    """Add `scaling * lora_B[e] @ lora_A[e]` to expert e of a projection (E, out, in).

    Attributes:
        lora_A: (E, r, in) DTensor, Shard(0) on `ep` as the experts are.
        lora_B: (E, out, r) DTensor, likewise.
        scaling: lora_alpha / r.
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        """Take the factors as they are: DTensors on the `ep` axis."""
        super().__init__()
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)
        self.scaling = scaling

    def local(self) -> LowRank:
        """Return the factors of this rank's experts."""
        return LowRank(local_tensor(self.lora_A), local_tensor(self.lora_B), self.scaling)

    def extra_repr(self) -> str:
        """Show sizes in the printed model."""
        num_experts, rank, _ = self.lora_A.shape
        return f"num_experts={num_experts}, r={rank}, scaling={self.scaling}"
