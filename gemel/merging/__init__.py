"""What merger.py is made of: options, state, initial weights of a trial, resuming, records, plan, checks, console.

Open state.py first: it holds the live models and knows how to undo a trial.
"""
