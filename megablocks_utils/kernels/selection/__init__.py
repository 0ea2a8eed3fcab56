"""Which backend runs the experts: by name, or `auto` by what was measured; one for all ranks."""
