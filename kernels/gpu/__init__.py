"""Triton sources, one file an operation, named as the operation's own file one floor up, which imports them when used.

Nothing here is imported without Triton, and `import kernels` imports nothing here. A file that ships kernels has
`aot_cases()` for the gate of kernels/aot.py.
"""
