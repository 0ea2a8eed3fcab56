from . import kernels, parallel_experts, utils  # noqa: F401
