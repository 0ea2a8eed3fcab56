"""Attention of packed rows without a mask of all tokens by all tokens."""
