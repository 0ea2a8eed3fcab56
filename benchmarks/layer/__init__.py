"""Parts of the benchmark of one MoE layer (`benchmarks.moe_layer`)."""
