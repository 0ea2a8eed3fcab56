"""Plant one bug after the other, and see the check of a family find it.

python -m tests.families.planted_bugs
"""
