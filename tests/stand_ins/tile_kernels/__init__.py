"""TileKernels' package."""
