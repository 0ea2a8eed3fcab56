"""One projection of the experts with its adapter: low-rank products, gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megablocks_utils.kernels.fused.kernel_launch import LoraRows, Routing, narrow
from megablocks_utils.kernels.fused.matrices import AnyMatrix, Matrix, build_matrix
from megablocks_utils.kernels.fused.row_gemm import row_gemm
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.fused.weight_grad import Operand, weight_grad


@dataclass(frozen=True)
class Parameters:
    """What of a projection may be trained; each None where there is none.

    Attributes:
        weight: (L, out, in), or (L, in, out) in a model that stores it so; may be packed.
        bias: (L, out).
        lora_a: (L, r, in).
        lora_b: (L, out, r).
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> "Parameters":
        """Name the four tensors of a projection, of which the first is there in any case."""
        weight, bias, lora_a, lora_b = tensors
        assert weight is not None
        return cls(weight, bias, lora_a, lora_b)


@dataclass(frozen=True)
class Projection:
    """A projection and how to run it.

    Attributes:
        parameters: its tensors.
        scaling: of the adapter.
        is_transposed: whether the weight is stored (in, out).
        routing: which rows go to which expert.
        tiles: sizes of the programs' work.
        num_programs: how many keep the device busy.
    """

    parameters: Parameters
    scaling: float
    is_transposed: bool
    routing: Routing
    tiles: TileTable
    num_programs: int

    def build_matrix(self) -> AnyMatrix:
        """Return the weights (in, out), of packed ones with scales that live as long as it."""
        return build_matrix(self.parameters.weight, is_transposed=self.is_transposed)

    def lora_rows(self, inputs: Operand | None) -> LoraRows | None:
        """Send inputs through A; the kernel that takes the result sends it through B."""
        lora_a, lora_b = self.parameters.lora_a, self.parameters.lora_b
        if lora_a is None or lora_b is None:
            return None
        rows = self._thin(inputs, Matrix(lora_a, rows_are_last=True))
        return LoraRows(rows, Matrix(lora_b, rows_are_last=True))

    def lora_grads(self, grads: Operand | None) -> LoraRows | None:
        """Send the outputs' gradients back through B; the next kernel sends them through A."""
        lora_a, lora_b = self.parameters.lora_a, self.parameters.lora_b
        if lora_a is None or lora_b is None:
            return None
        rows = self._thin(grads, Matrix(lora_b, rows_are_last=False))
        return LoraRows(rows, Matrix(lora_a, rows_are_last=False))

    def gradients(
        self,
        grads: Operand | None,
        inputs: Operand | None,
        lora_grads: LoraRows | None,
        bias_weights: Tensor | None,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Return the gradients of weight, bias, A and B; None where `needs` says so.

        Args:
            grads: the outputs' gradients; None where nothing needs them.
            inputs: what was multiplied, so that `grads^T inputs` is the weight's gradient; None
                where nothing needs it.
            lora_grads: what the method of that name made of `grads`.
            bias_weights: (N, 1), in expert order, so that `grads^T bias_weights` is the bias's.
            needs: whether each is needed.
        """
        weight, bias, lora_a, lora_b = (
            parameter if needed else None
            for parameter, needed in zip(vars(self.parameters).values(), needs, strict=True)
        )
        results: list[Tensor | None] = [None] * 4
        if weight is not None:
            results[0] = self._sum(grads, inputs, weight, is_transposed=self.is_transposed)
        if bias is not None:
            assert bias_weights is not None
            results[1] = self._sum(grads, Operand(bias_weights), bias.unsqueeze(2)).squeeze(2)
        if lora_a is not None:
            assert lora_grads is not None
            results[2] = self._sum(Operand(lora_grads.rows), inputs, lora_a)
        if lora_b is not None:
            lora_rows = self.lora_rows(inputs)
            assert lora_rows is not None
            results[3] = self._sum(grads, Operand(lora_rows.rows), lora_b)
        return results

    def _thin(self, rows: Operand | None, factor: Matrix) -> Tensor:
        assert rows is not None
        return row_gemm(
            rows.rows,
            factor,
            self.routing,
            narrow(self.tiles.skinny, factor.num_cols),
            gather=rows.by_token,
            scale=self.scaling,
        )

    def _sum(
        self, x: Operand | None, y: Operand | None, like: Tensor, *, is_transposed: bool = False
    ) -> Tensor:
        assert x is not None and y is not None
        return weight_grad(
            x,
            y,
            like.new_empty(like.shape),
            self.routing,
            self.tiles.weight_grad,
            num_programs=self.num_programs,
            is_transposed=is_transposed,
        )
