"""Runs a model forward: its modes, batches moved to its device, and hooks on its layers.

Open hooks.py first.
"""

WEIGHT_TYPES = ("float32", "float16", "bfloat16")  # in which weights can be stored and run
STORE_TYPES = (*WEIGHT_TYPES, "int8")  # in which they can be stored; int8 (with scales) runs as float32
AUTO, FLOAT32, BFLOAT16 = STEP_PRECISIONS = ("auto", "float32", "bfloat16")  # in which training steps can compute
TF32 = "tf32"  # the same in float32 with matrix products in TF32, on CUDA; chosen by measuring alone
