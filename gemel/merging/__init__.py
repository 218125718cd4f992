"""What stands around the trials of a merge: plan and checks before them, the record of a run, resuming, what is left.

Open records.py first.
"""
