"""What can be shared and how: groups, tying, strategies, memory. No datasets, no training loop."""
