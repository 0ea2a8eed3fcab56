"""Formulas of memory and traffic, the verdict on them, and what would make a run fit."""
