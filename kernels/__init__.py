"""Triton kernels, each beside the launcher that checks its arguments.

The PyTorch form of each operator, in `stars_fast.ops`, is the oracle of its kernel's tests.
"""
