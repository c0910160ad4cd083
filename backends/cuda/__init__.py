"""The engine of our own: a graph as CUDA kernels of its own."""
