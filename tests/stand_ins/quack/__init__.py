"""QuACK's package."""
