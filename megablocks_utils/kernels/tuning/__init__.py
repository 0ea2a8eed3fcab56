"""Measuring which backend and which tiles run a layer fastest, and keeping what was measured."""
