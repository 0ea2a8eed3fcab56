"""Everything that only a GPU can show, in parts of under nine minutes."""
