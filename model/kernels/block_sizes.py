"""How many numbers share a scale, by format. Imports no torch: configs are checked with these."""

KV_BLOCK = 64
"""Along the dims of keys and entries that RoPE does not rotate."""
MXFP4_BLOCK = 32
"""Along the last dimension (OCP MX 1.0)."""
FP8_BLOCK = 128
"""Along the last dimension of activations, and in both dimensions of a weight (V3 §3.3.2)."""
