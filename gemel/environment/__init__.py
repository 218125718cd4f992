"""What a run has around it: its device, seeds, clock, interrupts, and failures of the machine.

Open device.py first.
"""

DEVICES = ("auto", "cpu", "cuda")  # here, because the command line needs it before it imports torch
