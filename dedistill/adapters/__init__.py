"""Adapters: which linears, what kind and size, how they start, what they add up to, and their files.

LyCORIS provides the modules and the names in files; targets, initialisation, the delta and the merge are ours.
"""

import os

# On a GPU LyCORIS would pick fused kernels by timing them: other numbers from run to run, and atomics that add in any order.
os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")
