"""Shared weights in closed form and without labels: least squares on each task's own inputs, batch normalisation.

Open sequential_fit.py first: it fits one layer after another; least_squares.py fits one group.
"""
