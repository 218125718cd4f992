"""The embedded default: street scenes drawn here, small models trained here, once.

Open prepare.py first; tasks.py says what is drawn and trained.
"""
