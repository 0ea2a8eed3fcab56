"""Training data: records, formats, tokens, batches, and which step holds which example."""
