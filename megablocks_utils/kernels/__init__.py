"""Ways to run the same experts: the choice of a backend, and the backends."""
