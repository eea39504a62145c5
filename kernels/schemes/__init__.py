"""Quantization schemes: how keys or values are laid out, when they are quantized, and how. One module per scheme.

To add one, write a module with what ``base.Scheme`` names, and put it into ``SCHEMES``.
"""

from __future__ import annotations

import xquant_fx.kernels.schemes.per_channel as per_channel
import xquant_fx.kernels.schemes.per_channel_ranked as per_channel_ranked
import xquant_fx.kernels.schemes.per_token as per_token
import xquant_fx.kernels.schemes.per_token_folded as per_token_folded
import xquant_fx.kernels.schemes.per_token_rotated as per_token_rotated
from xquant_fx.kernels.schemes.base import Scheme

SCHEMES: dict[str, Scheme] = {
    "per_channel": per_channel,
    "per_channel_ranked": per_channel_ranked,
    "per_token": per_token,
    "per_token_folded": per_token_folded,
    "per_token_rotated": per_token_rotated,
}
