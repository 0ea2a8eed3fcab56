"""Our Triton kernels for the experts."""
