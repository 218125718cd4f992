"""Readers of the dataset layouts, what they hand over, checks of whole datasets, and the loaders of a task.

Open layouts.py to see which layouts there are, records.py for what a reader hands over, loaders.py for the loaders.
"""
