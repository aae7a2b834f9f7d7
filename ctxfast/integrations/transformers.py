"""`attn_implementation="ctxfast"`: this package's attention inside transformers' own layers.

It serves any model of transformers 5 that dispatches its attention through the registry. Projections, norms and the
padding in everything else stay transformers' own; `ctxfast.accelerate` replaces those too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctxfast import ops

NAME = "ctxfast"

# What a model may ask of its attention beyond masks, and this one does not compute.
_UNSUPPORTED = ("softcap", "s_aux", "cache")


def register() -> None:
    """Makes attn_implementation="ctxfast" known to `from_pretrained` and `set_attn_implementation`.

    Registers the attention and the mask function together: with the first alone transformers makes no mask, and
    padding is attended to. Registering again does nothing new. `output_attentions=True` gives weights.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**arguments: Any) -> Tensor | None:
    """A mask bool, true = attend: [B, 1, 1, S] for padding alone, else [B, 1, Sq, Sk] as for sdpa; None for none."""
    from transformers import masking_utils

    padding, length = arguments.get("attention_mask"), arguments["kv_length"]
    if (
        arguments.get("mask_function") is not masking_utils.bidirectional_mask_function
        or arguments.get("use_vmap")
        or (padding is not None and padding.shape[-1] != length)
    ):
        return masking_utils.sdpa_mask(**arguments)
    if padding is None or (padding.device.type == "cpu" and bool(padding.all())):
        return None
    return padding.bool()[:, None, None, :]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B, H, Sq, D], key and value [B, H or fewer, Sk, D] -> ([B, Sq, H, D], weights or None)."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not support {name}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # a static cache that holds nothing yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    keys = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        if attention_mask.shape[1:3] == (1, 1) and attention_mask.shape[0] == query.shape[0]:
            keys, attention_mask = attention_mask[:, 0, 0], None
    elif attention_mask is not None:
        attention_mask = attention_mask.to(query.dtype)
    options: dict[str, Any] = {
        "attn_mask": attention_mask,
        "key_padding_mask": keys,
        "bias": position_bias,
        "is_causal": causal,
        "dropout_p": dropout,
        "scale": scaling,
    }
    if kwargs.get("output_attentions"):
        weights = ops.attention_weights(query, key, **options)
        return (weights @ value).transpose(1, 2).contiguous(), weights
    return ops.attention(query, key, value, **options).transpose(1, 2).contiguous(), None
