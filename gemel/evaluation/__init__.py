"""Runs a task's eval method, and computes average precision as COCO does.

Open eval_method.py first; the methods that a dictionary names are in eval_methods.py of the checkout.
"""
