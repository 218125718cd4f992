"""What can be shared, and sharing it: signatures, groups, tying, adapters, private scales and biases, bytes.

Open groups.py for what is planned, tying.py for what is done to models.
"""
