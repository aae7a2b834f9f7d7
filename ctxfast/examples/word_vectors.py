"""Vectors of words in their sentences: from an ELMo, from a BERT, and from two models that see less."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ctxfast.elmo import ElmoEmbedder, is_elmo

_BATCH = 32


def layer_vectors(
    directory: str | os.PathLike[str], sentences: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """All layers of every word, [L, n, D] for each sentence of n words; the lowest layer first.

    directory: an ELMo (directory or zip file) or a BERT; of a word in several pieces the first counts
    """
    if is_elmo(directory):
        embedder = ElmoEmbedder(directory, stateful="reset")
        return list(embedder.embed_sentences(sentences, _BATCH))
    return _bert_vectors(directory, sentences)


@torch.inference_mode()
def _bert_vectors(
    directory: str | os.PathLike[str], sentences: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    from ctxfast.bert import BertModel, BertTokenizer
    from ctxfast.packed import PackedBatch

    tokenizer = BertTokenizer.from_pretrained(directory)
    model = BertModel.from_pretrained(directory, add_pooling_layer=False)
    begin, end = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
    limit = model.config.max_position_embeddings - 2
    found: list[np.ndarray] = []
    for start in range(0, len(sentences), _BATCH):
        rows, firsts = [], []
        for sentence in sentences[start : start + _BATCH]:
            pieces = tokenizer(list(sentence), add_special_tokens=False)["input_ids"]
            starts = np.cumsum([1, *(max(len(p), 1) for p in pieces)])[:-1]
            flat = [i for p in pieces for i in (p or [int(tokenizer.unk_token_id)])]
            rows.append([begin, *flat[:limit], end])
            firsts.append(np.minimum(starts, limit))
        batch = PackedBatch.from_lengths([len(row) for row in rows])
        ids = torch.tensor([i for row in rows for i in row])
        output = model.forward_packed(ids, batch, output_hidden_states=True)
        layers = torch.stack(output.hidden_states)  # [L, T, D]
        parts = layers.split([len(row) for row in rows], 1)
        found += [part[:, first].numpy() for part, first in zip(parts, firsts, strict=True)]
    return found


def left_context_vectors(
    sentences: Sequence[Sequence[str]], epochs: int = 20, size: int = 64
) -> list[np.ndarray]:
    """[1, n, size] of an LSTM language model trained on these sentences: each word sees what is left of it."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(sorted({w for s in sentences for w in s}), 1)}
    embedding = nn.Embedding(len(vocabulary) + 1, size)
    lstm = nn.LSTM(size, size, batch_first=True)
    output = nn.Linear(size, len(vocabulary) + 1)
    parameters = [p for m in (embedding, lstm, output) for p in m.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)
    rows = [torch.tensor([vocabulary[w] for w in s]) for s in sentences]
    groups = [
        nn.utils.rnn.pad_sequence(rows[i : i + _BATCH], batch_first=True)
        for i in range(0, len(rows), _BATCH)
    ]
    for _ in range(epochs):
        for ids in groups:
            logits = output(lstm(embedding(ids[:, :-1]))[0])
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return [lstm(embedding(row[None]))[0].numpy() for row in rows]


def skip_gram_vectors(
    sentences: Sequence[Sequence[str]], size: int = 64
) -> list[np.ndarray] | None:
    """[1, n, size] of a skip-gram model (Mikolov et al., 2013), one vector a word; None without gensim."""
    try:
        from gensim.models import Word2Vec
    except ImportError:
        return None
    model = Word2Vec(
        [list(s) for s in sentences], vector_size=size, sg=1, min_count=1, epochs=20, seed=0, workers=1
    )  # fmt: skip
    return [np.stack([model.wv[w] for w in s])[None] for s in sentences]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def learned_mix(layers: Tensor, labels: Tensor, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Layers [L, N, D] of N labelled words -> the mix that a linear classifier of the labels likes, and its weights."""
    torch.manual_seed(0)
    normal = nn.functional.normalize(layers, dim=-1)
    weights = torch.zeros(layers.shape[0], requires_grad=True)
    head = nn.Linear(layers.shape[2], int(labels.max()) + 1)
    optimiser = torch.optim.Adam([weights, *head.parameters()], 0.05, weight_decay=1e-4)
    for _ in range(steps):
        mixed = torch.einsum("l,lnd->nd", weights.softmax(0), normal)
        loss = nn.functional.cross_entropy(head(mixed), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    shares = weights.detach().softmax(0)
    return torch.einsum("l,lnd->nd", shares, normal), shares
