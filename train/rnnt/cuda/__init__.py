"""The losses on CUDA: numba kernels, and their launches on torch's current stream.

May import `checks` and `autograd` above it. No GPU has run these kernels yet.
"""
