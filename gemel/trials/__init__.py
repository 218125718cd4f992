"""A trial of a merge: the live models and what is tied, initial weights, short trainings, what is judged and kept.

Open state.py first.
"""
