"""Multi-head attention (Vaswani et al., 2017) with the interface of torch.nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.nn.fusion import as_packed_linear, is_ordinary, recast, values_readable
from ctxfast.nn.packed_linear import PackedModule, linear
from ctxfast.packed import PackedBatch

_NAME = "MultiheadAttention"


class MultiheadAttention(PackedModule, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on the fused operators: its arguments, parameters, masks and results.

    It is the same everywhere, in values and gradients, but for three things:

    * a query that may attend no key has zero weights, so that its output is the bias of out_proj; torch gives NaN there
      when need_weights is True;
    * dropout draws its mask as `ctxfast.reference.dropout` says, not as torch does;
    * out_proj is called where it is not a plain linear layer or has hooks; torch reads its weight in any case.

    `need_weights=False` is the fast path: the weights [batch, heads, L, S] are never held. add_bias_kv, add_zero_attn,
    nested tensors and parameters of tensor subclasses run in torch's own forward.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.out_proj = as_packed_linear(self.out_proj)  # type: ignore[assignment]

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """This class with the parameters of a torch.nn.MultiheadAttention: the same Parameter objects, not copies."""
        new = recast(module, cls)
        new.out_proj = as_packed_linear(new.out_proj)  # type: ignore[assignment]
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the queries over keys and values, with L queries and S keys.

        query: [batch, L, embed_dim] with batch_first, otherwise [L, batch, embed_dim]; unbatched [L, embed_dim]
        key:   the same with S and kdim;  value: with S and vdim
        key_padding_mask: [batch, S], unbatched [S]; bool, True = ignore the key, whatever lies there, NaN included; or
               floating, added to the scores
        attn_mask: [L, S] or [batch * heads, L, S]; bool, True = may not attend; or floating, added to the scores
        is_causal: promises that attn_mask is the causal mask, which is then not read

        Returns the output, in the shape of query, and with need_weights the weights after dropout: [batch, L, S]
        averaged over the heads, or [batch, heads, L, S]; without batch if unbatched.
        Raises TypeError for a wrong dtype and ValueError for a wrong shape, or is_causal without attn_mask.
        """
        if self.runs_in_torch() or query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        self._validate(query, key, value)
        q, k, v = (self._split(x, query.dim()) for x in self._project(query, key, value))
        arguments = self._masks(q, k, query.dim(), attn_mask, key_padding_mask, is_causal)
        if not need_weights:
            output = ops.attention(q, k, v, **arguments)
            return linear(self.out_proj, self._merge(output, query.dim())), None
        weights = ops.attention_weights(q, k, **arguments)  # [B, H, L, S]
        valid = arguments["key_padding_mask"]
        if valid is not None:
            v = v.where(valid[:, None, :, None], 0.0)
        output = linear(self.out_proj, self._merge(weights @ v, query.dim()))
        if average_attn_weights:
            weights = weights.mean(1)
        return output, weights if query.dim() == 3 else weights.squeeze(0)

    def forward_packed(
        self,
        input: Tensor,
        batch: PackedBatch,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        tile_map: Tensor | None = None,
    ) -> Tensor:
        """Self-attention on packed tokens [T, embed_dim] -> [T, embed_dim].

        attn_mask: as in `forward`, on positions of the padded grid: the heads are padded for it
        is_causal: each token attends itself and the earlier ones of its sequence; attn_mask is not read
        tile_map: `ops.attention_tile_map` of the batch, so that layers share it
        """
        projected = self._project(input, input, input)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in projected)
        dropout_p = self.dropout if self.training else 0.0
        if attn_mask is None or is_causal:
            output = ops.attention_varlen(
                q,
                k,
                v,
                cu_seqlens_q=batch.cu_seqlens,
                cu_seqlens_k=batch.cu_seqlens,
                max_seqlen_q=batch.max_seqlen,
                max_seqlen_k=batch.max_seqlen,
                tile_map_q=tile_map,
                tile_map_k=tile_map,
                is_causal=is_causal,
                dropout_p=dropout_p,
            )
            return linear(self.out_proj, output.flatten(1))
        q, k, v = (batch.pad(x).transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
        valid = batch.pad(torch.ones_like(batch.indices, dtype=torch.bool))
        arguments = self._masks(q, k, 3, attn_mask, ~valid, False)
        output = batch.pack(ops.attention(q, k, v, **arguments).transpose(1, 2))
        return linear(self.out_proj, output.flatten(1))

    def runs_in_torch(self) -> bool:
        """Whether this module is of the kind that torch's own forward computes."""
        parameters = (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            self.in_proj_bias,
        )
        return (
            self.bias_k is not None
            or self.add_zero_attn
            or not all(is_ordinary(parameter) for parameter in parameters)
        )

    def _validate(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        order = "batch, sequence" if self.batch_first else "sequence, batch"
        inputs = {
            "query": (query, self.embed_dim),
            "key": (key, self.kdim),
            "value": (value, self.vdim),
        }
        for name, (x, features) in inputs.items():
            if x.dim() != query.dim() or x.dim() not in (2, 3) or x.shape[-1] != features:
                raise ValueError(
                    f"{_NAME}: {name} must be [{order}, {features}] or, like query, "
                    f"[sequence, {features}], got shape {tuple(x.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{_NAME}: value must be {[*key.shape[:-1], self.vdim]} for that key, "
                f"got shape {tuple(value.shape)}"
            )
        place = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[place] != key.shape[place]:
            raise ValueError(
                f"{_NAME}: key must have the batch size of query, {query.shape[place]}, "
                f"got shape {tuple(key.shape)}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """[..., features] -> three of [..., embed_dim]; inputs that are one tensor share one product."""
        bias, size = self.in_proj_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return tuple(map(ops.linear, (query, key, value), weights, biases))
        weight = self.in_proj_weight
        if query is key and key is value:
            copy = self._packed((weight,), (bias,), query)
            if copy is None:
                return ops.linear(query, weight, bias).chunk(3, -1)
            return copy.linear(query, bias, None).chunk(3, -1)
        q_weight, kv_weight = weight[:size], weight[size:]
        q_bias, kv_bias = (None, None) if bias is None else (bias[:size], bias[size:])
        q = ops.linear(query, q_weight, q_bias)
        if key is value:
            return q, *ops.linear(key, kv_weight, kv_bias).chunk(2, -1)
        (k_weight, v_weight) = kv_weight.chunk(2)
        k_bias, v_bias = (None, None) if kv_bias is None else kv_bias.chunk(2)
        return q, ops.linear(key, k_weight, k_bias), ops.linear(value, v_weight, v_bias)

    def _split(self, x: Tensor, dims: int) -> Tensor:
        """A projection of inputs with `dims` dimensions -> [B, H, S, D]."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if dims == 2:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge(self, x: Tensor, dims: int) -> Tensor:
        """[B, H, S, D] -> the layout of the inputs, [..., H * D]."""
        if dims == 2:
            x = x.squeeze(0).transpose(0, 1)
        else:
            x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return x.flatten(-2)

    def _masks(
        self,
        query: Tensor,
        key: Tensor,
        dims: int,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> dict[str, Any]:
        """torch.nn's masks, where True forbids, as the arguments of `ops.attention`, where True allows."""
        batch, heads, length, keys = *query.shape[:3], key.shape[2]
        if is_causal:
            if attn_mask is None:
                raise ValueError(f"{_NAME}: attn_mask must be given with is_causal=True, got None")
            attn_mask = None
        allowed = valid = bias = None
        if attn_mask is not None:
            shapes = ((length, keys), (batch * heads, length, keys))
            validate_mask(f"{_NAME}: attn_mask", attn_mask, *shapes)
            four = (1, 1) if attn_mask.dim() == 2 else (batch, heads)
            attn_mask = attn_mask.reshape(*four, length, keys)
            if attn_mask.dtype == torch.bool:
                allowed = ~attn_mask
            else:
                bias = attn_mask.to(query.dtype)
        if key_padding_mask is not None:
            expected = (keys,) if dims == 2 else (batch, keys)
            validate_mask(f"{_NAME}: key_padding_mask", key_padding_mask, expected)
            padding, added = split_padding(key_padding_mask.view(batch, keys))
            valid = ~padding
            if added is not None:
                added = added.to(query.dtype)[:, None, None, :]
                bias = added if bias is None else bias + added
        return {
            "attn_mask": allowed,
            "key_padding_mask": valid,
            "bias": bias,
            "is_causal": is_causal,
            "dropout_p": self.dropout if self.training else 0.0,
        }


def validate_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {expected}, got shape {tuple(mask.shape)}")


def split_padding(mask: Tensor, read: bool | None = None) -> tuple[Tensor, Tensor | None]:
    """torch.nn's key padding mask as a bool mask, True = ignore, and what else is added to the scores.

    The second is None for a bool mask, and for a floating one that holds 0 and -inf alone, where its values may be
    read: by default on a CPU, where that costs no synchronisation.
    """
    if mask.dtype == torch.bool:
        return mask, None
    padding = mask == -torch.inf
    read = mask.device.type == "cpu" if read is None else read
    read = read and values_readable(mask) and not mask.requires_grad
    if read and bool((padding | (mask == 0)).all()):
        return padding, None
    return padding, mask.masked_fill(padding, 0.0)
