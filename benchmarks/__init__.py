"""Measured comparisons: every file is a command that prints a table, and what it measured is recorded in LOG.md.

Open strategies.py first: it compares whole merges. workloads.py reads the workload for every command.
"""
