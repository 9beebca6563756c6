"""Scales of float8 pages, one per KV head, measured once on a fixed text.

float8_e4m3fn has three bits of mantissa from 2**-6 to 448, so a scale need not be sharp: it has to
keep the head's numbers inside that range. The largest of a short text is put well below the top,
which leaves room for larger ones in other texts; what exceeds it all the same is clamped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_fast.models.pool import Pools
from stars_fast.ops.fused import Rotary, rotate

#: Where the largest number of the measured text is put, an eighth of the largest there is.
_TARGET = 56.0


class ScaleProbe:
    """The `LayerAttention` of a forward without pages, which sets the scales of some pools.

    Windows are left out: the text is short. The attention itself is plain and causal.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._layer = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float,
        sinks: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Record the largest key and value of each head, and attend."""
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        layer = self._layer
        self._layer += 1
        for scales, new in ((self._pools.k_scales, key), (self._pools.v_scales, value)):
            scale = scales[layer]
            assert scale is not None
            largest = new.to(torch.float32).abs().amax(dim=(0, 2))
            scale.copy_(torch.where(largest > 0, largest / _TARGET, 1.0))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.squeeze(0).transpose(0, 1)
