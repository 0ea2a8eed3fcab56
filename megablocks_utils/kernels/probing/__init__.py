"""The comparison of a backend with `eager` on the weights at hand, before the first step."""
