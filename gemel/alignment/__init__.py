"""Lines up layers and channels of models that were trained apart, so that layers to be tied mean the same.

A permutation of channels does not change what a model computes. Open align.py first.
"""
