"""The `v4` command. Imports of ours only `trainer.config`; everything else runs as a subprocess."""
