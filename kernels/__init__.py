"""Triton kernels, one file per layer kind; installed as `fastmeta.kernels`."""
