"""The embedded default workload: draws street scenes as datasets and trains small models on them, once.

Open prepare.py first; tasks.py defines what is drawn and trained. Nothing here is needed for a workload of your own.
"""
