"""Triton kernels and their launchers; the only importer of triton. They know no autograd and no modules."""
