"""One file per operation: the public function and its plain PyTorch reference.

``x_triton.py`` has the kernels for Hopper beside ``x.py``; where there are several, they have files
of their own, ``x_part_triton.py``. What operations share is in ``ranges.py`` and, of kernels, in
``rotation_triton.py`` and ``pairs_triton.py``. Functions here take local tensors and plain
integers, know nothing of configurations, modules or process groups, and keep memory linear in the
number of tokens.
"""
