"""The results folder: written atomically, loaded with shared weights in memory once, verified, repaired.

Needs torch, safetensors and model_architectures alone. Open write.py for how a result is written, load.py for how it is
loaded, schema.py for what a manifest holds.
"""
