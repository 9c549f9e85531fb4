"""Hypothesis strategies for tableaux."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from symplectic_plugin import ButcherTableau


@st.composite
def tableaux(draw: st.DrawFn, zero_weights: bool | None = None) -> ButcherTableau:
    """Draw a random explicit tableau with 1 to 6 stages; by default, zero weights are drawn too."""
    s = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a = torch.randn(s, s, dtype=torch.float64, generator=generator).tril(-1)
    a *= (torch.rand(s, s, generator=generator) < draw(st.sampled_from([0.5, 1.0]))).double()
    b = torch.rand(s, dtype=torch.float64, generator=generator) + 0.1
    b *= torch.where(torch.rand(s, generator=generator) < 0.3, -1.0, 1.0)
    if zero_weights is None:
        zero_weights = draw(st.booleans())
    if zero_weights:
        b *= (torch.rand(s, generator=generator) < 0.6).double()
    return ButcherTableau(a, b, a.sum(1))
