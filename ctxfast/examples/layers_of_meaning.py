"""Which layer knows what: the meaning of one ambiguous word, and parts of speech, layer by layer.

    python -m ctxfast.examples.layers_of_meaning DIRECTORY [--word stick] [--senses FILE] [--conllu TRAIN TEST]
                                                 [--picture OUT.png]

DIRECTORY is an ELMo or a BERT. Without --senses twelve sentences with *stick* are used; FILE is annotated sentences as
JSON lines (keys tok and ann, gzip or not) or text, one sentence a line: label, tab, words. For each layer it prints how
often the nearest other occurrence of the word has the same meaning and, with --conllu, how well a linear classifier
reads parts of speech off that layer (Peters et al., 2018, section 5.3: syntax below, meaning above).
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ctxfast.elmo import is_elmo
from ctxfast.examples.elmo_tagger import read_conllu
from ctxfast.examples.word_vectors import (
    layer_vectors,
    learned_mix,
    left_context_vectors,
    skip_gram_vectors,
    unit,
)

Example = tuple[str, list[str]]  # meaning, words

STICK: list[Example] = [
    (meaning, sentence.split())
    for meaning, sentence in (
        ("wood", "The dog ran after the stick and brought it back ."),
        ("wood", "He leaned on a walking stick as he crossed the yard ."),
        ("wood", "She poked the fire with a long stick ."),
        ("wood", "A dry stick snapped under his boot ."),
        ("wood", "The boys drew lines in the sand with a stick ."),
        ("wood", "An old man shook his stick at the crows ."),
        ("hold", "The stamps would not stick to the envelope ."),
        ("hold", "Wet leaves stick to the windows in autumn ."),
        ("hold", "Press the label down so that it will stick ."),
        ("hold", "His shirt began to stick to his back ."),
        ("hold", "Snow did not stick on the warm road ."),
        ("hold", "The pages stick together when they are damp ."),
    )
]


def read_senses(path: str | Path, word: str, limit: int = 400) -> list[Example]:
    """Sentences with the word, its most frequent meanings (ten occurrences or more, two at least)."""
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    examples: list[Example] = []
    for line in text.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            for place, lemma, _, sense in entry["ann"]:
                if lemma == word and entry["tok"][place].lower() == word:
                    examples.append((sense, entry["tok"]))
                    break
        elif "\t" in line:
            meaning, sentence = line.split("\t", 1)
            examples.append((meaning, sentence.split()))
    counts = Counter(meaning for meaning, _ in examples).most_common()
    kept = {meaning for i, (meaning, n) in enumerate(counts) if i < 2 or n >= 10}
    return [example for example in examples if example[0] in kept][:limit]


def occurrences(
    vectors: Sequence[np.ndarray], examples: Sequence[Example], word: str
) -> np.ndarray:
    """[L, N, D] of the word's first place in each sentence."""
    places = [[w.lower() for w in words].index(word) for _, words in examples]
    return np.stack([v[:, place] for v, place in zip(vectors, places, strict=True)], 1)


def sense_score(x: np.ndarray, labels: Sequence[str]) -> float:
    """How often the nearest other row of [N, D] has the same label; ties count as the share among the nearest."""
    similarity = unit(x) @ unit(x).T
    np.fill_diagonal(similarity, -2.0)
    right = 0.0
    for i, row in enumerate(similarity):
        nearest = np.flatnonzero(row >= row.max() - 1e-6).tolist()
        right += float(np.mean([labels[j] == labels[i] for j in nearest if j != i]))
    return right / len(labels)


def probe(train: Tensor, train_tags: Tensor, test: Tensor, test_tags: Tensor) -> float:
    """Accuracy of multinomial logistic regression on standardised vectors [N, D]."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    head = nn.Linear(train.shape[1], int(train_tags.max()) + 1)
    nn.init.zeros_(head.weight)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=40)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(train), train_tags)
        loss = loss + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return float((head(test).argmax(1) == test_tags).float().mean())


def speech_scores(
    directory: str, train_file: str, test_file: str, sentences: int = 300
) -> list[float]:
    """Accuracy of the probe on each layer."""
    parts = [read_conllu(path)[:sentences] for path in (train_file, test_file)]
    tags = sorted({tag for _, tag in (pair for part in parts for s in part for pair in s)})
    data = []
    for part in parts:
        vectors = layer_vectors(directory, [[word for word, _ in s] for s in part])
        numbers = torch.tensor([tags.index(tag) for s in part for _, tag in s])
        data.append((torch.from_numpy(np.concatenate(vectors, 1)), numbers))
    (train, train_tags), (test, test_tags) = data
    return [probe(a, train_tags, b, test_tags) for a, b in zip(train, test, strict=True)]


def neighbours(
    directory: str, words: Sequence[str], vocabulary: Sequence[str]
) -> dict[str, list[str]]:
    """The three words of the vocabulary nearest to each word, each alone, in the lowest layer."""
    vectors = layer_vectors(directory, [[w] for w in (*words, *vocabulary)])
    x = unit(np.stack([v[0, 0] for v in vectors]))
    similarity = x[: len(words)] @ x[len(words) :].T
    order = np.argsort(-similarity, 1)[:, :3]
    return {w: [vocabulary[int(j)] for j in row] for w, row in zip(words, order, strict=True)}


def draw(
    path: str, layers: np.ndarray, labels: list[str], senses: list[float], speech: list[float]
) -> None:
    """The word's occurrences on two principal axes, by layer, and the scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    figure, axes = pyplot.subplots(1, len(shown) + 1, figsize=(4 * len(shown) + 4, 3.6))
    kinds = sorted(set(labels))
    for axis, layer in zip(axes, shown, strict=False):
        x = layers[layer] - layers[layer].mean(0)
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        for kind in kinds:
            rows = [i for i, label in enumerate(labels) if label == kind]
            axis.scatter(u[rows, 0] * s[0], u[rows, 1] * s[1], label=kind[-24:], s=18)
        axis.set_title(f"layer {layer}")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].legend(fontsize=7)
    axes[-1].plot(senses, marker="o", label="same meaning")
    if speech:
        axes[-1].plot(speech, marker="s", label="part of speech")
    axes[-1].set_xlabel("layer")
    axes[-1].set_ylim(0, 1.02)
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--word", default="stick")
    parser.add_argument("--senses")
    parser.add_argument("--conllu", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--picture")
    options = parser.parse_args(arguments)
    examples = read_senses(options.senses, options.word) if options.senses else STICK
    labels = [meaning for meaning, _ in examples]
    sentences = [words for _, words in examples]
    layers = occurrences(layer_vectors(options.directory, sentences), examples, options.word)
    senses = [sense_score(x, labels) for x in layers]
    numbers = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    mix, shares = learned_mix(torch.from_numpy(layers), numbers)
    speech = speech_scores(options.directory, *options.conllu) if options.conllu else []
    print(f"{len(examples)} sentences with {options.word!r}, {len(set(labels))} meanings")
    print(f"{'':18}same meaning{'  part of speech' if speech else ''}")
    for i, score in enumerate(senses):
        print(f"layer {i:<12}{score:12.2f}" + (f"{speech[i]:16.2f}" if speech else ""))
    weights = " ".join(f"{share:.2f}" for share in shares)
    print(f"{'learned mix':18}{sense_score(mix.numpy(), labels):12.2f}  (weights {weights})")
    static = skip_gram_vectors(sentences)
    left = left_context_vectors(sentences)
    for name, found in (("skip-gram", static), ("left-only LSTM", left)):
        if found is not None:
            score = sense_score(occurrences(found, examples, options.word)[0], labels)
            print(f"{name:18}{score:12.2f}")
    if is_elmo(options.directory):
        vocabulary = sorted({w.lower() for s in sentences for w in s if w.isalpha()})
        odd = [options.word[:1] + options.word[2:], options.word + "iness"]
        for word, near in neighbours(options.directory, odd, vocabulary).items():
            print(f"nearest to {word!r}: {', '.join(near)}")
    if options.picture:
        draw(options.picture, layers, labels, senses, speech)


if __name__ == "__main__":
    main()
