"""Shared weights in closed form and without labels: least squares on each task's own inputs, batch normalisation.

Open sequential_fit.py first: it fits layer behind layer; least_squares.py fits one group.
"""
