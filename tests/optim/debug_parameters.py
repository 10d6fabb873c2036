"""A small model with every kind of layer, for the optimizer's tests: window, CSA, HCA, MTP."""

from model import ModelConfig
from model.parameters import Shapes, parameter_shapes, parameter_table

D, H, K, Q, G, O, N, E, F, V, I, J = 48, 4, 16, 24, 2, 8, 4, 6, 24, 96, 2, 8
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=3,
    max_position_embeddings=4096,
    num_attention_heads=H,
    head_dim=K,
    qk_rope_head_dim=8,
    q_lora_rank=Q,
    o_groups=G,
    o_lora_rank=O,
    sliding_window=8,
    layer_types=("window", "csa", "hca"),
    csa_compress_ratio=4,
    hca_compress_ratio=128,
    index_n_heads=I,
    index_head_dim=J,
    index_topk=6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=None,
    num_hash_layers=0,
    n_routed_experts=E,
    num_experts_per_tok=3,
    moe_intermediate_size=F,
    routed_scaling_factor=1.5,
    num_nextn_predict_layers=1,
    hc_mult=N,
)
_EIGHT_LAYERS = {"num_hidden_layers": 8, "layer_types": ("window", "csa", "hca", *["window"] * 5)}
FACTS = parameter_table(CONFIG.model_copy(update=_EIGHT_LAYERS))
"""Of more layers than `shapes` has: tests make up some of their own."""


def shapes() -> Shapes:
    """Shapes of its parameters by name."""
    return parameter_shapes(CONFIG)
