"""One room for each operation, with the same implementations inside.

`__init__.py` has the public functions, which choose an implementation by device, dtype and shape
(`backend.py`). `naive.py` is the readable mathematics, differentiated by autograd on any device and
in any dtype: all others are compared with it. `eager.py` is plain PyTorch made fast, which runs on
CPUs. `*_triton.py` are the kernels for Hopper, imported only where they run. `compiled.py` has what
torch.compile makes of norms, activation and streams; `hadamard.py` and `mxfp4.py` are small enough
for one file.

Functions take local tensors and plain integers, know nothing of configurations, modules or process
groups, and keep memory linear in the number of tokens.
"""
