"""Runs a model forward: its modes, batches moved to its device, and hooks on its layers.

Open hooks.py first.
"""
