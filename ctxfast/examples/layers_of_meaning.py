"""Which layer knows what: the meaning of one ambiguous word, and parts of speech, layer by layer.

    python -m ctxfast.examples.layers_of_meaning DIRECTORY [--word stick] [--senses FILE] [--conllu TRAIN TEST]
                                                 [--picture OUT.png]

DIRECTORY is an ELMo or a BERT. Without --senses twelve sentences with *stick* are used; FILE is annotated sentences as
JSON lines (keys tok and ann, gzip or not) or text, one sentence a line: label, tab, words.

For each layer it prints how often the nearest other occurrence of the word has the same meaning (a neighbour drawn at
random: the row "chance") and, with --conllu, how well a linear classifier reads parts of speech off that layer (Peters
et al., 2018, section 5.3: lower layers syntax, higher layers meaning). The picture needs matplotlib, skip-gram gensim.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
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
    """Sentences with the word, its most frequent meanings (ten occurrences or more, two at least).

    Raises ValueError where they have fewer than two meanings.
    """
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
            if word in sentence.lower().split():
                examples.append((meaning, sentence.split()))
    counts = Counter(meaning for meaning, _ in examples).most_common()
    if len(counts) < 2:
        raise ValueError(
            f"--senses must hold {word!r} in two meanings or more, got {len(examples)} sentences of "
            f"{len(counts)} in {path}"
        )
    kept = {meaning for i, (meaning, n) in enumerate(counts) if i < 2 or n >= 10}
    return [example for example in examples if example[0] in kept][:limit]


def occurrences(
    vectors: Sequence[np.ndarray], examples: Sequence[Example], word: str
) -> np.ndarray:
    """[L, N, D] of the word's first place in each sentence."""
    places = [[w.lower() for w in words].index(word) for _, words in examples]
    return np.stack([v[:, place] for v, place in zip(vectors, places, strict=True)], 1)


def neighbour_agrees(x: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """[N]: whether the nearest other row of [N, D] has the same label; the share of them where several are nearest."""
    similarity = unit(x) @ unit(x).T
    np.fill_diagonal(similarity, -2.0)
    right = np.zeros(len(labels))
    for i, row in enumerate(similarity):
        nearest = np.flatnonzero(row >= row.max() - 1e-6).tolist()
        right[i] = np.mean([labels[j] == labels[i] for j in nearest if j != i])
    return right


def sense_score(x: np.ndarray, labels: Sequence[str]) -> float:
    """How often the nearest other row of [N, D] has the same label."""
    return float(neighbour_agrees(x, labels).mean())


def chance(labels: Sequence[str]) -> float:
    """How often another row drawn at random has the same label."""
    pairs = sum(n * (n - 1) for n in Counter(labels).values())
    return pairs / (len(labels) * (len(labels) - 1))


def mix_score(layers: np.ndarray, labels: Sequence[str]) -> tuple[float, Tensor]:
    """`sense_score` of a mix of [L, N, D], and its mean weights; each half by the weights learned on the other half."""
    kinds = sorted(set(labels))
    numbers = torch.tensor([kinds.index(label) for label in labels])
    right, weights = np.zeros(len(labels)), []
    for half in (0, 1):
        found = torch.from_numpy(layers[:, 1 - half :: 2])
        shares = learned_mix(found, numbers[1 - half :: 2])[1]
        mixed = np.einsum("l,lnd->nd", shares.numpy(), unit(layers))
        right[half::2] = neighbour_agrees(mixed, labels)[half::2]
        weights.append(shares)
    return float(right.mean()), torch.stack(weights).mean(0)


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
    """The word's occurrences on two principal axes, by layer, and the scores; equal vectors are one larger dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.collections import PathCollection

    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    figure, axes = pyplot.subplots(1, len(shown) + 1, figsize=(4 * len(shown) + 4, 4.2))
    kinds = [kind for kind, _ in Counter(labels).most_common()]
    for axis, layer in zip(axes, shown, strict=False):
        x = layers[layer] - layers[layer].mean(0)
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        places = np.round(u[:, :2] * s[:2] / s[0], 4)
        for kind in kinds:
            rows = [i for i, label in enumerate(labels) if label == kind]
            dots, counts = np.unique(places[rows], axis=0, return_counts=True)
            name = f"{kind[-24:]} ({len(rows)})"
            axis.scatter(*dots.T, label=name, s=18 * counts, alpha=0.6, linewidths=0)
        axis.set_title(f"layer {layer}")
        axis.margins(0.12)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[-1].plot(senses, marker="o", color="black", label="same meaning")
    axes[-1].axhline(chance(labels), color="black", ls=":", lw=1, label="same meaning, by chance")
    if speech:
        axes[-1].plot(speech, marker="s", color="grey", label="part of speech")
    axes[-1].set_title("scores")
    axes[-1].set_xlabel("layer")
    axes[-1].set_xticks(range(len(layers)))
    axes[-1].set_ylim(0, 1.02)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    for axis, place in ((axes[0], 0.02), (axes[-1], 0.98)):
        lines, names = axis.get_legend_handles_labels()
        legend = figure.legend(
            lines,
            names,
            loc="lower left" if place < 0.5 else "lower right",
            bbox_to_anchor=(place, 0.0),
            ncols=min(4, len(names)),
            fontsize=8,
        )
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_sizes([24])
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--word", default="stick")
    parser.add_argument("--senses")
    parser.add_argument("--conllu", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--picture")
    options = parser.parse_args(arguments)
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib, which is not installed")
    if not options.senses and options.word != "stick":
        parser.error(f"--word {options.word} needs sentences with it: give --senses FILE")
    try:
        examples = read_senses(options.senses, options.word) if options.senses else STICK
        labels = [meaning for meaning, _ in examples]
        sentences = [words for _, words in examples]
        layers = occurrences(layer_vectors(options.directory, sentences), examples, options.word)
        speech = speech_scores(options.directory, *options.conllu) if options.conllu else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    senses = [sense_score(x, labels) for x in layers]
    print(f"{len(examples)} sentences with {options.word!r}, {len(set(labels))} meanings")
    print(f"{'':18}same meaning{'  part of speech' if speech else ''}")
    for i, score in enumerate(senses):
        print(f"layer {i:<12}{score:12.2f}" + (f"{speech[i]:16.2f}" if speech else ""))
    score, shares = mix_score(layers, labels)
    weights = " ".join(f"{share:.2f}" for share in shares)
    print(f"{'learned mix':18}{score:12.2f}  (weights {weights})")
    static = skip_gram_vectors(sentences)
    left = left_context_vectors(sentences)
    for name, found in (("skip-gram", static), ("left-only LSTM", left)):
        if found is None:
            print(f"{name:18}     skipped: gensim is not installed")
        else:
            score = sense_score(occurrences(found, examples, options.word)[0], labels)
            print(f"{name:18}{score:12.2f}")
    print(f"{'chance':18}{chance(labels):12.2f}")
    if is_elmo(options.directory):
        vocabulary = sorted({w.lower() for s in sentences for w in s if w.isalpha()})
        odd = [options.word[:1] + options.word[2:], options.word + "iness"]
        for word, near in neighbours(options.directory, odd, vocabulary).items():
            print(f"nearest to {word!r}: {', '.join(near)}")
    if options.picture:
        draw(options.picture, layers, labels, senses, speech)


if __name__ == "__main__":
    main()
