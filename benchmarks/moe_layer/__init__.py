"""One MoE layer: our kernels against those of others."""
