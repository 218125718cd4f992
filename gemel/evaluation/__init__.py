"""Runs a task's eval method; average precision as COCO counts it; how much two models agree.

Open eval_method.py first; the methods that a dictionary names are in eval_methods.py of the checkout.
"""
