"""Entries of a bf16 model against those of float64, which differ by their own rounding only."""

from __future__ import annotations

import pytest
import torch

from model import SampleLayout
from model.config import LayerType
from model.exchange import LocalExchange
from model.kernels.compressor.naive import naive_pool_windows
from model.kernels.norm.naive import naive_rms_norm
from model.positions import Positions
from tests.model.tiny import random_model, tiny_config


@pytest.mark.parametrize(("kind", "layer"), [("csa", 1), ("hca", 2)])
def test_entries_are_rounded_once(kind: LayerType, layer: int) -> None:
    """As in the official code, which projects, pools and norms in fp32."""
    model = random_model(tiny_config(), dtype=torch.bfloat16)
    compressor = model.attentions()[layer].compressor
    assert compressor is not None
    layout = SampleLayout.from_lengths([[70, 26]])
    positions = Positions.of_microbatch(model.config, layout)
    x = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        entries = compressor(x, positions, LocalExchange())
        values, gates = (
            x.double() @ w.weight.double().t() for w in (compressor.wkv, compressor.wgate)
        )
    windows = positions.windows(kind)
    where = windows.first_token_C, windows.has_previous_C, kind == "csa"
    pooled = naive_pool_windows(values, gates, compressor.ape.double(), *where)
    weight, eps = compressor.norm.weight.double(), model.config.rms_norm_eps
    exact = naive_rms_norm(pooled, weight, eps, windows.rotation_Cr.to(torch.complex128))
    assert entries.dtype == torch.bfloat16 and len(entries) > 4
    # Half of the last of 8 bits; sums and the rotation's table are in fp32.
    torch.testing.assert_close(entries.double(), exact, rtol=1.001 * 2**-8, atol=1e-6)
