"""One optimizer step: micro-batches, loss, recomputation, optimizer, checks."""
