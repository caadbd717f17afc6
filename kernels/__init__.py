"""Triton kernels, one file per layer kind; installed as `fastmeta.kernels`.

A layer kind is the same four functions as in `csrc/cpu/layers`: `forward`, `backward`, `tangent`,
`tangent_backward`. Here they take a pass over the network for all tasks at once (`passes.Pass`) and
record launches.
"""
