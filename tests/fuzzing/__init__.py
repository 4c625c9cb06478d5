"""Hostile guests, front ends and nonsense messages, as many as wanted: for rings, devices, workers and the launcher.

`scripts/fuzz --help` says how to run it long; tests/test_ring_fuzz.py runs some of it with every change. A *target* is
what is fuzzed; a *case* is one go at it, and everything in it follows from the seed, the target's name and the case's
number. So what was found can be had again: `scripts/fuzz --seed S --only TARGET --case N`.

Only in worker processes, whose guest runs beside them, the order of things is the machine's as well.
"""
