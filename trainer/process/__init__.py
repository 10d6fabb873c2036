"""This process and its machine: errors and exit codes, signals, failing ranks, memory, leases.

Its modules are imported by their names, since `v4 --help` may not wait for torch.
"""
