"""Measured comparisons: every file is a command that prints a table and saves what it measured."""
