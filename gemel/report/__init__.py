"""One self-contained page from a results folder: what was merged, what it saved, which layers are one, and why not.

Needs the folder alone, no data and no models. Open page.py first.
"""
