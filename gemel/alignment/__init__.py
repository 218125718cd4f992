"""Matches layers, and permutes channels, of models that were trained apart, so that the layers to be tied agree.

A permutation of channels does not change what a model computes. Open align.py first.
"""
