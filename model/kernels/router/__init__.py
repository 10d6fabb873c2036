"""Selection of experts, their weights, and the sums of the balance loss (report §2.1, V3 §2.1.2).

T tokens; E experts; A experts of a token, L = T·A; Z samples.
"""

from __future__ import annotations

from model.kernels.router.eager import route, sample_sums

__all__ = ["route", "sample_sums"]
