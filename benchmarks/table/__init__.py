"""The benchmark table: published, predicted and measured, side by side."""
