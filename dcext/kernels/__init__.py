"""Triton kernels. Importing ``dcext`` does not import them, nor triton."""
