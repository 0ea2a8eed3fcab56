"""Our Triton kernels for the experts: gather, both projections, gate, adapters, all gradients.

Four matrix kernels and a weighted sum. A forward pass is `gate_up` -> `row_gemm` -> `combine`, a
backward pass `gate_backward` -> `row_gemm` -> `combine`, and `weight_grad` for whatever is trained;
adapters are thin `row_gemm`s whose results the next kernel adds in its epilogue.

Legend of shapes beside the package's: N = T * K routed rows in expert order, r rank of an adapter.
Every reduction has a fixed order and one owner: results repeat bit for bit, there are no atomics.
"""
