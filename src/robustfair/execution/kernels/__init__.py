"""Kernels of our own for CPUs: what no library at hand computes as fast."""
