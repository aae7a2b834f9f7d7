"""Transformer encoders (Vaswani et al., 2017; pre-norm: Xiong et al., 2020) with the interface of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.nn.fusion import (
    add_and_normalise,
    as_packed_linear,
    epilogue,
    is_elementwise,
    is_stock,
    is_tokenwise,
    normalise,
    recast,
    values_readable,
)
from ctxfast.nn.multihead_attention import MultiheadAttention, split_padding, validate_mask
from ctxfast.nn.packed_linear import PackedLinear, linear
from ctxfast.packed import PackedBatch

# oneDNN prepares itself anew for every number of rows, so packed token counts are rounded up.
_ROW_MULTIPLE = 16


@dataclass(frozen=True)
class _PaddedRows:
    """Tokens in the layout of the caller; masks as torch.nn has them."""

    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    is_causal: bool
    batch_first: bool

    def attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        return attention(
            x,
            x,
            x,
            attn_mask=self.attn_mask,
            key_padding_mask=self.key_padding_mask,
            need_weights=False,
            is_causal=self.is_causal,
        )[0]

    def coordinates(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Sequence and position of each row for the dropout mask; None where the operator counts them itself."""
        if self.batch_first or x.dim() != 3:
            return None, None
        seq_len, batch_size = x.shape[:2]
        sequence_ids = torch.arange(batch_size, device=x.device).expand(seq_len, batch_size)
        positions = torch.arange(seq_len, device=x.device)[:, None]
        return sequence_ids, positions.expand(seq_len, batch_size)


@dataclass(frozen=True)
class _PackedRows:
    """Tokens of a packed batch, [T, N]."""

    batch: PackedBatch
    attn_mask: Tensor | None
    is_causal: bool

    def attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        return attention.forward_packed(  # type: ignore[operator]
            x,
            self.batch,
            attn_mask=self.attn_mask,
            is_causal=self.is_causal,
            tile_map=self.tile_map,
        )

    @cached_property
    def tile_map(self) -> Tensor | None:
        """What the attention of every layer and its backward share."""
        return ops.attention_tile_map(self.batch.cu_seqlens, self.batch.total)

    def coordinates(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self.batch.sequence_ids, self.batch.positions


_Rows = _PaddedRows | _PackedRows


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on the fused operators: its arguments, parameters, masks and results.

    A submodule that is not of the stock class, or has hooks, is called and not fused. Dropout in the attention, and
    before a norm, draws its mask as `ctxfast.reference.dropout` says; elsewhere the submodule draws it. Rows that may
    attend nothing: `MultiheadAttention`. Nested tensors, and subclasses with a `_sa_block` or `_ff_block` of their own,
    run in torch's own forward.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self._convert()

    @classmethod
    def from_torch(cls, layer: nn.TransformerEncoderLayer) -> TransformerEncoderLayer:
        """This class with the parameters of a torch.nn.TransformerEncoderLayer: the same Parameter objects.

        Submodules that are not torch's own stay as they are.
        """
        new = recast(layer, cls)
        new._convert()
        return new

    def _convert(self) -> None:
        if type(self.self_attn) is nn.MultiheadAttention:
            self.self_attn = MultiheadAttention.from_torch(self.self_attn)
        self.linear1 = as_packed_linear(self.linear1)  # type: ignore[assignment]
        self.linear2 = as_packed_linear(self.linear2)  # type: ignore[assignment]

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """One layer; src and result: [batch, sequence, d_model], [sequence, batch, d_model] or unbatched.

        The masks and is_causal are those of `MultiheadAttention.forward`. Padded positions are computed as well.
        """
        if src.is_nested or not self._has_own_blocks():
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        batch_first = self.self_attn.batch_first
        return self.encode(src, _PaddedRows(src_mask, src_key_padding_mask, is_causal, batch_first))

    def encode(self, x: Tensor, rows: _Rows) -> Tensor:
        """The layer on padded or packed rows [..., d_model]."""
        if self.norm_first:
            x = x + self.dropout1(rows.attend(self.self_attn, normalise(self.norm1, x)))
            return x + self.dropout2(self._feed_forward(normalise(self.norm2, x)))
        attended = rows.attend(self.self_attn, x)
        x = add_and_normalise(self.norm1, self.dropout1, attended, x, rows.coordinates)
        hidden = self._feed_forward(x)
        return add_and_normalise(self.norm2, self.dropout2, hidden, x, rows.coordinates)

    def _feed_forward(self, x: Tensor) -> Tensor:
        fused = epilogue(self.activation)
        hidden = linear(self.linear1, x, fused)
        if fused is None:
            hidden = self.activation(hidden)
        return linear(self.linear2, self.dropout(hidden))

    def _has_own_blocks(self) -> bool:
        """Whether no subclass has redefined the two blocks of torch's layer."""
        stock, cls = nn.TransformerEncoderLayer, type(self)
        return cls._sa_block is stock._sa_block and cls._ff_block is stock._ff_block

    def runs_packed(self) -> bool:
        """Whether the layer may be given packed tokens: every part of it looks at one token at a time."""
        linears = (self.linear1, self.linear2, self.self_attn.out_proj)
        dropouts = (self.dropout, self.dropout1, self.dropout2)
        return (
            is_stock(self, TransformerEncoderLayer)
            and self._has_own_blocks()
            and is_stock(self.self_attn, MultiheadAttention)
            and not self.self_attn.runs_in_torch()  # type: ignore[operator]
            and all(is_stock(module, PackedLinear, nn.Linear) for module in linears)
            and is_tokenwise(self.norm1)
            and is_tokenwise(self.norm2)
            and all(is_stock(module, nn.Dropout) for module in dropouts)
            and is_elementwise(self.activation)
        )


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder on the fused operators: its arguments, parameters, masks and results.

    With src_key_padding_mask the output is zero in padding, whatever the mode and the layers; elsewhere it is torch's.
    Padding is removed once, wherever it lies, at the price of one synchronisation on a GPU, and all layers run on
    packed tokens. They run on the padded grid where a layer is of another class or has a part that need not work token
    by token (hooks, activations or submodules of one's own), where the mask is floating with values besides 0 and -inf,
    and while a graph is traced. `enable_nested_tensor=False` also computes padded positions, and returns what torch
    does there. `mask_check` has no effect: any mask will do.

    encoder_layer: copied num_layers times; torch's own layers become `TransformerEncoderLayer`, others stay
    """

    last_padding: float | None = None

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # Without nested tensors, about whose conditions torch would warn.
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = self.use_nested_tensor = enable_nested_tensor
        self._convert()

    @classmethod
    def from_torch(cls, encoder: nn.TransformerEncoder) -> TransformerEncoder:
        """This class with the parameters of a torch.nn.TransformerEncoder: the same Parameter objects, not copies."""
        new = recast(encoder, cls)
        new.use_nested_tensor = new.enable_nested_tensor
        new._convert()
        return new

    def _convert(self) -> None:
        self.layers = nn.ModuleList(
            TransformerEncoderLayer.from_torch(layer)
            if type(layer) is nn.TransformerEncoderLayer
            else layer
            for layer in self.layers
        )

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """All layers and the norm; src and result: [batch, sequence, d_model], [sequence, batch, d_model] or unbatched.

        mask, src_key_padding_mask: attn_mask and key_padding_mask of `MultiheadAttention.forward`
        is_causal: promises that mask is the causal mask; None looks, except while a graph is traced
        """
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        batch_first = self.layers[0].self_attn.batch_first
        causal = _is_causal_mask(mask) if is_causal is None else is_causal
        self.last_padding = None
        if src_key_padding_mask is None or not self.use_nested_tensor:
            return self._encode_padded(src, mask, src_key_padding_mask, causal, None)
        shape = src.shape[:-1] if batch_first or src.dim() == 2 else src.shape[1::-1]
        validate_mask("TransformerEncoder: src_key_padding_mask", src_key_padding_mask, shape)
        readable = values_readable(src_key_padding_mask)
        padding, added = split_padding(src_key_padding_mask, read=readable)
        if readable:
            grid, tokens = padding.numel(), padding.numel() - int(padding.sum())
            self.last_padding = 1 - tokens / max(grid, 1)
            if tokens == grid and added is None:
                return self._encode_padded(src, mask, None, causal, None)
            if src.dim() == 3 and added is None and self._runs_packed():
                capacity = max(-(-tokens // _ROW_MULTIPLE), 1) * _ROW_MULTIPLE
                batch = PackedBatch.from_mask(~padding, capacity)
                return self._encode_packed(src, mask, causal, batch, batch_first)
        given = padding if added is None else src_key_padding_mask
        grid_padding = padding if batch_first or src.dim() == 2 else padding.t()
        return self._encode_padded(src, mask, given, causal, grid_padding.unsqueeze(-1))

    def _runs_packed(self) -> bool:
        return all(
            isinstance(layer, TransformerEncoderLayer) and layer.runs_packed()
            for layer in self.layers
        )

    def _encode_packed(
        self, src: Tensor, mask: Tensor | None, causal: bool, batch: PackedBatch, batch_first: bool
    ) -> Tensor:
        if causal and mask is None:
            raise ValueError("TransformerEncoder: mask must be given with is_causal=True, got None")
        x = batch.pack(src if batch_first else src.transpose(0, 1))
        rows = _PackedRows(batch, mask, causal)
        for layer in self.layers:
            x = layer.encode(x, rows)  # type: ignore[operator]
        if self.norm is None or is_tokenwise(self.norm):
            x = batch.pad(x if self.norm is None else normalise(self.norm, x))
            return x if batch_first else x.transpose(0, 1).contiguous()
        x = batch.pad(x)
        valid = batch.pad(torch.ones_like(batch.indices, dtype=torch.bool)).unsqueeze(-1)
        if not batch_first:
            x, valid = x.transpose(0, 1).contiguous(), valid.transpose(0, 1)
        return self.norm(x).masked_fill(~valid, 0.0)

    def _encode_padded(
        self,
        src: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        causal: bool,
        padding: Tensor | None,
    ) -> Tensor:
        """padding: True where input and output are zeroed, so that nothing there reaches a result or a gradient."""
        x = src if padding is None else src.masked_fill(padding, 0.0)
        for layer in self.layers:
            own = type(layer).forward is TransformerEncoderLayer.forward
            x = layer(
                x,
                src_mask=mask if own else _additive(mask, src.dtype),
                is_causal=causal,
                src_key_padding_mask=(
                    key_padding_mask if own else _additive(key_padding_mask, src.dtype)
                ),
            )
        if self.norm is not None:
            x = normalise(self.norm, x)
        return x if padding is None else x.masked_fill(padding, 0.0)


def _is_causal_mask(mask: Tensor | None) -> bool:
    """Whether a mask [S, S] of torch.nn is the causal one; False where its values cannot be read."""
    if mask is None or mask.dim() != 2 or mask.requires_grad or not values_readable(mask):
        return False
    if mask.shape[0] != mask.shape[1]:
        return False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, future)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(future, -torch.inf))


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask in the form in which torch's encoder gives it to its layers: added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
