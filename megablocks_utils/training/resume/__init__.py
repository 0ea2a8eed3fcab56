"""What a resumed run needs: the checkpoint, its state, and what must be the same."""
