"""Who holds what: the device mesh, the placement of experts, and the exchange of tokens."""
