"""One package per operation, each with the same set of implementations.

`__init__.py` has the public functions, which choose an implementation by device, dtype and shape
(`backend.py`). `naive.py` is the readable reference implementation, differentiated by autograd on
any device and in any dtype: all others are compared with it. `eager.py` is optimised plain PyTorch
(`indexer` has `select_eager.py` and `loss_eager.py`), which runs on CPUs. `*_triton.py` are the
kernels for Hopper, imported only where they run. They and `eager.py` name in their docstrings the
public function that they implement, which has the contract. `compiled.py` holds the torch.compile'd
norms, SwiGLU backward and hyper-connections; `flash_mla_triton.py` and `tile_kernels_library.py`
call optional libraries. `hadamard.py` and `mxfp4.py` are small enough for one file.

Functions take local tensors and plain integers and have no access to configs, modules or process
groups; only a `KLTarget` may bring a function that communicates. Memory is linear in the number of
tokens, except in `naive.py`.
"""
