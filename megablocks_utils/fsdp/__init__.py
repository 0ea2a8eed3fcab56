"""Sharding of everything but the experts: FSDP1, FSDP2, and the gradients of both."""
