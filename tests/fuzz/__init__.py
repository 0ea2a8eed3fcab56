"""Seeded fuzzers of every door: what is bad is refused in a sentence, or changes nothing.

    python -m tests.fuzz [--cases N] [--seed S] [--jobs N] [--timeout S] [--keep DIR] [GROUP ...]

Each case is a run of a command on a tiny model with one input mutated, in a process forked from one
that has imported everything. It writes nothing outside a scratch folder: inputs are copies there,
working folder, home, caches and temporary files lie there, and as root it gives up its rights
first. A line of JSON for each case, then a table; exit code 1 where a case failed.
"""
