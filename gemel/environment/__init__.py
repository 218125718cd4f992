"""What a run gets from its machine and its user: device, random seeds, clock, interrupts, failures of the hardware.

Open device.py first: it is the only place that chooses a device.
"""

DEVICES = ("auto", "cpu", "cuda")  # defined here because the command line needs it before torch is imported
