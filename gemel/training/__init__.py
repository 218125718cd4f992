"""What trainer.py is made of: the step, validation, early stopping, losses, distillation, the frozen prefix.

Open step.py first.
"""
