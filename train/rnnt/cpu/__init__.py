"""The losses on the CPU: numba kernels, and the threads that run them.

May import `cache`, `checks` and `autograd` above it.
"""
