"""Training: the loop, its engine, checkpoints, metrics, and what reads them afterwards.

`trainer.config` imports without torch, so that a login node can read and check a config.
"""
