"""The losses on the CPU: numba kernels, and the threads that run them. May import `checks` and `autograd` above it."""
