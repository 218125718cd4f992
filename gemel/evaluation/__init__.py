"""Runs a task's eval method, and counts average precision as COCO does.

Open eval_method.py first; the methods themselves are in eval_methods.py of the checkout.
"""
