"""Measures every operation of kernels against its reference, its peers and the limits of the machine: see README.md."""
