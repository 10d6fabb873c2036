"""One file per operation: the public function and its plain PyTorch reference.

Functions here take local tensors and plain integers, know nothing of configurations, modules or
process groups, and keep memory linear in the number of tokens.
"""
