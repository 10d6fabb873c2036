"""The operations that have more than one implementation. Imports no torch: configs name them."""

OPERATIONS = (
    "attention",
    "indexer",
    "indexer_loss",
    "compressor",
    "norms",
    "hyper_connections",
    "swiglu",
    "permute",
    "cross_entropy",
    "fp8",
    "syrk",
)
"""Names as `kernels` of a config has them. "attention" includes the entries' probability mass,
"norms" the rotations, "permute" the MoE combine; "fp8" is matmuls and their operands'
quantisation; "syrk" is the optimizer's symmetric matmul."""
