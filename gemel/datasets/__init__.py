"""Reads datasets: readers of four annotation layouts, samples, checks of whole datasets, and the loaders of a task.

Open layouts.py first: it lists the layouts. records.py defines what a reader returns, loaders.py the loaders.
"""
