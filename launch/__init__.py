"""The `v4` command. Imports no torch; the work runs in subprocesses."""
