"""Comparators, training tasks and the experiment runner: `python -m baselines`.

This is where claims about `apo` are tried on real data. A *method* (`methods.py`) trains a model and may change its
hyperparameters; a *run* (`run.py`) is one method on one task, deterministic for a seed and resumable at any step; a
*cell* (`cells.py`) is a run that has ended, stored; an *experiment* (`experiments/`) is a table or figure of cells.
It is part of the repository, not of the wheel.
"""
