"""Words masked for pretraining (Devlin et al., 2019, section 3.1 and appendix A.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def mask_tokens(
    ids: Tensor,
    k: float = 0.15,
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    exact: bool = True,
    max_predictions: int | None = None,
    whole_words: bool = False,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    mask_token_id: int = 103,
    special_ids: tuple[int, ...] = (0, 101, 102),
    vocab_size: int = 30522,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses the tokens that a model is to predict, and hides most of them.

    ids:            int64 [B, S] or [S]
    attention_mask: the same shape, non-zero at tokens, by default where ids are not [PAD]
    k:              the share of tokens to choose. exact: k of each row's length, specials counted, rounded half to
                    even, at least 1 and at most max_predictions, as the original counts; otherwise each token, or each
                    word, with probability k
    whole_words:    pieces that begin with ## are chosen with the word that they belong to, and never so that the
                    count is exceeded; needs a tokenizer
    mask_share, random_share: of the chosen tokens these become [MASK], and words drawn from the whole vocabulary; the
                    rest stays
    tokenizer:      gives [MASK], the specials [PAD], [CLS], [SEP] and the vocabulary's size, which are otherwise those
                    of the released uncased model: mask_token_id, special_ids, vocab_size

    Returns masked ids and labels, the chosen tokens' own ids and -100 elsewhere, both of the shape of ids. Neither
    specials, [MASK] included, nor padding is chosen. Raises ValueError and TypeError for bad arguments.
    """
    _check(ids, k, attention_mask, max_predictions, mask_share, random_share)
    if whole_words and tokenizer is None:
        raise ValueError("mask_tokens: whole_words needs a tokenizer, got None")
    if tokenizer is not None:
        mask_token_id, vocab_size = tokenizer.mask_token_id, len(tokenizer)
        special_ids = tuple(
            getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")
        )
    rows = ids.reshape(-1, ids.shape[-1])
    valid = torch.ones_like(rows, dtype=torch.bool)
    if attention_mask is not None:
        valid = attention_mask.reshape(rows.shape) != 0
    elif special_ids:
        valid = rows != special_ids[0]
    excluded = rows.new_tensor([*special_ids, mask_token_id])
    candidates = valid & ~torch.isin(rows, excluded)

    def draw() -> Tensor:
        return torch.rand(rows.shape, generator=generator, device=rows.device)

    starts = candidates & ~_continuations(rows, tokenizer) if whole_words else candidates
    scores = draw()
    if exact:
        counts = (valid.sum(1) * k).round().long().clamp(min=1)
        counts = counts if max_predictions is None else counts.clamp(max=max_predictions)
        if whole_words:
            chosen = _choose_words(scores, starts, candidates, counts)
        else:
            ranks = scores.masked_fill(~candidates, 2.0).argsort(1).argsort(1)
            chosen = candidates & (ranks < counts[:, None])
    else:
        chosen = starts & (scores < k)
        if whole_words:
            chosen = candidates & _of_their_word(chosen, starts)
    fate = draw()
    words = torch.randint(vocab_size, rows.shape, generator=generator, device=rows.device)
    masked = torch.where(chosen & (fate < mask_share), mask_token_id, rows)
    masked = torch.where(chosen & (fate >= 1.0 - random_share), words, masked)
    labels = rows.masked_fill(~chosen, IGNORED)
    return masked.view(ids.shape), labels.view(ids.shape)


def _continuations(rows: Tensor, tokenizer: Any) -> Tensor:
    """True at pieces that begin with ##."""
    known = rows.unique()
    pieces = tokenizer.convert_ids_to_tokens(known.tolist())
    inner = known[torch.tensor([piece.startswith("##") for piece in pieces], dtype=torch.bool)]
    return torch.isin(rows, inner)


def _of_their_word(chosen: Tensor, starts: Tensor) -> Tensor:
    """Gives every piece the value of the start of its word; what stands before the first start has none."""
    places = torch.arange(chosen.shape[1], device=chosen.device).expand(chosen.shape)
    word = places.masked_fill(~starts, -1).cummax(1).values  # where the word begins
    return chosen.gather(1, word.clamp(min=0)) & (word >= 0)


def _choose_words(scores: Tensor, starts: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """Words in the order of their scores, one that would exceed the count passed over."""
    chosen = torch.zeros_like(candidates)
    for row, count in enumerate(counts.tolist()):
        begins = starts[row].nonzero().squeeze(1).tolist()
        is_candidate = candidates[row].tolist()
        words = []
        for begin, limit in zip(begins, [*begins[1:], len(is_candidate)], strict=True):
            end = begin + 1
            while end < limit and is_candidate[end]:
                end += 1
            words.append((begin, end))
        left = count
        for place in scores[row, begins].argsort().tolist():
            begin, end = words[place]
            if end - begin <= left:
                chosen[row, begin:end] = True
                left -= end - begin
    return chosen


def _check(
    ids: Tensor,
    k: float,
    attention_mask: Tensor | None,
    max_predictions: int | None,
    mask_share: float,
    random_share: float,
) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"mask_tokens: ids must be an int64 tensor, got {got}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"mask_tokens: ids must be [B, S] or [S], got shape {tuple(ids.shape)}")
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ValueError(
            f"mask_tokens: attention_mask must be {tuple(ids.shape)}, got shape {tuple(attention_mask.shape)}"
        )
    for name, value in (("k", k), ("mask_share", mask_share), ("random_share", random_share)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"mask_tokens: {name} must be in [0, 1], got {value}")
    if mask_share + random_share > 1.0 + 1e-9:
        raise ValueError(
            "mask_tokens: mask_share and random_share must add up to at most 1, "
            f"got {mask_share} and {random_share}"
        )
    if max_predictions is not None and max_predictions < 1:
        raise ValueError(f"mask_tokens: max_predictions must be at least 1, got {max_predictions}")
