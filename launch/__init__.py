"""The `v4` command. Imports only `trainer.config` of ours; the work runs in subprocesses."""
