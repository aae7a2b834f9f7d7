"""A part-of-speech tagger on frozen ELMo vectors: a scalar mix, one small LSTM, one linear layer are learned.

    python -m ctxfast.examples.elmo_tagger ELMO_DIRECTORY train.conllu dev.conllu

Only the mix's weights, its gamma and the tagger itself get gradients (Peters et al., 2018, section 3.3).
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ctxfast.elmo import Elmo, batch_to_ids

Sentence = list[tuple[str, str]]  # (word, tag) pairs


class Tagger(nn.Module):
    """ELMo, dropout, a bidirectional LSTM, a linear layer over the tags."""

    def __init__(self, elmo: Elmo, tags: Sequence[str], hidden: int = 100) -> None:
        super().__init__()
        self.elmo = elmo
        self.tags = list(tags)
        self.lstm = nn.LSTM(elmo.get_output_dim(), hidden, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * hidden, len(tags))

    def forward(self, sentences: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Logits [B, T, tags] and mask [B, T]."""
        found = self.elmo(batch_to_ids(sentences))
        vectors, mask = found["elmo_representations"][0], found["mask"]
        return self.output(self.lstm(vectors)[0]), mask

    def loss(self, batch: Sequence[Sentence]) -> Tensor:
        logits, mask = self([[word for word, _ in sentence] for sentence in batch])
        gold = torch.tensor([self.tags.index(tag) for sentence in batch for _, tag in sentence])
        return nn.functional.cross_entropy(logits[mask], gold)

    @torch.no_grad()
    def accuracy(self, sentences: Sequence[Sentence]) -> float:
        self.eval()
        right = total = 0
        for batch in batches(sentences):
            logits, mask = self([[word for word, _ in sentence] for sentence in batch])
            guesses = logits[mask].argmax(-1).tolist()
            gold = [tag for sentence in batch for _, tag in sentence]
            right += sum(self.tags[g] == tag for g, tag in zip(guesses, gold, strict=True))
            total += len(gold)
        return right / max(total, 1)


def batches(sentences: Sequence[Sentence], size: int = 32) -> Iterator[Sequence[Sentence]]:
    for start in range(0, len(sentences), size):
        yield sentences[start : start + size]


def train(
    tagger: Tagger, sentences: Sequence[Sentence], epochs: int = 3, rate: float = 2e-3
) -> None:
    """Adam on what is not frozen; L2 0.001 on the mix, as the authors advise."""
    mix: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in tagger.named_parameters():
        if parameter.requires_grad:
            (mix if "scalar_parameters" in name else rest).append(parameter)
    groups = [{"params": rest}, {"params": mix, "weight_decay": 1e-3}]
    optimiser = torch.optim.Adam(groups, rate)  # type: ignore[arg-type]
    for epoch in range(epochs):
        tagger.train()
        losses = []
        for batch in batches(sentences):
            loss = tagger.loss(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", file=sys.stderr)


def read_conllu(path: str | Path) -> list[Sentence]:
    """Words and universal tags of a CoNLL-U file, gzip-compressed or not."""
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    sentences: list[Sentence] = [[]]
    for line in text.splitlines():
        if not line:
            sentences.append([])
        elif line[0] != "#" and line.split("\t")[0].isdigit():
            fields = line.split("\t")
            sentences[-1].append((fields[1], fields[3]))
    return [sentence for sentence in sentences if sentence]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", help="of an ELMo")
    parser.add_argument("train", help="CoNLL-U file to learn from")
    parser.add_argument("test", help="CoNLL-U file to measure on")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        sentences, test = read_conllu(options.train), read_conllu(options.test)
        elmo = Elmo(options.directory, None, 1, dropout=0.5)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    elmo.stateful = "reset"
    tagger = Tagger(elmo, sorted({tag for sentence in sentences for _, tag in sentence}))
    train(tagger, sentences)
    print(f"accuracy {tagger.accuracy(test):.4f}")


if __name__ == "__main__":
    main()
