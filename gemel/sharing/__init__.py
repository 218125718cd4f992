"""What can be shared, and sharing it: signatures, groups, tied parameters, low-rank adapters, bytes.

Open groups.py for what is planned, tying.py for what is done to models.
"""
