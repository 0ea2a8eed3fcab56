"""Fine-tune Mixture-of-Experts language models with expert parallelism."""
