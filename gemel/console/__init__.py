"""What people see of a merge: the command line, tables, the status line, the log, TensorBoard.

Open tables.py first.
"""
