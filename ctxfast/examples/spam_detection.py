"""Fine-tune BERT to detect spam: python -m ctxfast.examples.spam_detection MESSAGES.tsv

Each line of the file is a label, a tab and a text; any set of labels will do. The encoder starts from the real weights
of MiniLM (or --model DIRECTORY), the pooling and classification layers on [CLS] from random ones, and all of it is
trained.
--from-scratch starts the encoder from random values too, which shows what pretraining gave.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ctxfast.bert import BertConfig, BertForSequenceClassification, BertTokenizer
from ctxfast.demo import find_weights

NEW = (
    "WINNER! Claim your 1000 pound prize now, call 09061701461 before midnight",
    "Are we still meeting at the station at six?",
    "Free entry to our weekly draw, text WIN to 80086 now",
    "Mum says dinner is ready, where are you",
)
Rows = list[tuple[str, str]]  # label, text


def read(path: Path) -> Rows:
    """The lines of a TSV, each text once: a repeated one would leak from training into the test."""
    rows: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        label, tab, text = line.partition("\t")
        if tab and text.strip():
            rows.setdefault(text.strip(), label.strip())
        elif line.strip():
            raise ValueError(f"{path}, line {number} must be a label, a tab and a text")
    found = [(label, text) for text, label in rows.items()]
    if len({label for label, _ in found}) < 2 or len(found) < 20:
        raise ValueError(f"{path} must hold at least 20 different texts with at least 2 labels")
    return found


def split(rows: Rows, seed: int) -> tuple[Rows, Rows, Rows]:
    """80 % to train, 10 % to watch, 10 % to test."""
    rows = random.Random(seed).sample(rows, len(rows))
    tenth = len(rows) // 10
    return rows[2 * tenth :], rows[tenth : 2 * tenth], rows[:tenth]


def scores(predicted: Sequence[str], rows: Rows, positive: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the label `positive`."""
    truth = [label for label, _ in rows]
    hits = sum(p == t == positive for p, t in zip(predicted, truth, strict=True))
    precision = hits / max(1, list(predicted).count(positive))
    recall = hits / max(1, truth.count(positive))
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


class Detector:
    """The model with its tokenizer."""

    def __init__(self, directory: Path, labels: Sequence[str], from_scratch: bool) -> None:
        self.tokenizer = BertTokenizer.from_pretrained(directory)
        # Three epochs are too few to overfit: in cross-validation dropout gained nothing, and it takes time.
        options: dict[str, Any] = {
            "id2label": dict(enumerate(labels)),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        if from_scratch:
            config = BertConfig.from_pretrained(directory, **options)
            self.model = BertForSequenceClassification(config)
            return
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # the classification layer is meant to be new
            self.model = BertForSequenceClassification.from_pretrained(directory, **options)
        # MiniLM's distillation left its pooling layer untrained: a zero bias and noise of a fifth of this size, which
        # holds up the gradient. Zhang et al. (2021) renew even a trained one.
        assert self.model.bert.pooler is not None
        pooling = self.model.bert.pooler.dense
        torch.nn.init.xavier_uniform_(pooling.weight)
        torch.nn.init.zeros_(pooling.bias)

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(
            self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
        )

    @torch.inference_mode()
    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """The label of each text and its probability."""
        self.model.eval()
        found: list[tuple[str, float]] = []
        for start in range(0, len(texts), 64):
            logits = self.model(**self.encode(texts[start : start + 64])).logits
            best = logits.softmax(-1).max(-1)
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                found.append((self.model.config.id2label[index], probability))
        return found

    def train(self, rows: Rows, args: argparse.Namespace) -> Iterator[int]:
        """Trains all parameters, and pauses after each epoch."""
        label2id = self.model.config.label2id
        order = random.Random(args.seed)
        steps = args.epochs * -(-len(rows) // args.batch_size)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.learning_rate, weight_decay=0.01, fused=True
        )

        def rate(step: int) -> float:  # rises for a tenth of the steps, then falls to nothing
            return min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps), 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for epoch in range(args.epochs):
            self.model.train()
            shuffled = order.sample(rows, len(rows))
            starts = range(0, len(rows), args.batch_size)
            for start in tqdm(starts, desc=f"epoch {epoch + 1}", leave=False, disable=None):
                batch = shuffled[start : start + args.batch_size]
                labels = torch.tensor([label2id[label] for label, _ in batch])
                inputs = self.encode([text for _, text in batch])
                with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
                    loss = self.model(**inputs, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            yield epoch + 1


def linear_svc(train: Rows, test: Rows, positive: str) -> str:
    """What a linear classifier of character n-grams reaches, the line to beat."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC
    except ImportError:
        return "skipped, scikit-learn is not installed"
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    features = vectorizer.fit_transform([text for _, text in train])
    model = LinearSVC().fit(features, [label for label, _ in train])
    predicted = model.predict(vectorizer.transform([text for _, text in test]))
    return "precision {:.3f}  recall {:.3f}  F1 {:.3f}".format(*scores(predicted, test, positive))


def run(args: argparse.Namespace) -> float:
    """Trains and reports; the F1 on the test tenth."""
    train, watched, test = split(read(args.messages), args.seed)
    counts = {label: sum(label == other for other, _ in train) for label in {r[0] for r in train}}
    labels = sorted(counts)
    positive = "spam" if "spam" in counts else min(labels, key=lambda label: counts[label])
    directory = args.model or find_weights()
    print(f"{len(train)} texts to train, {len(watched)} to watch, {len(test)} to test; {counts}")
    torch.manual_seed(args.seed)
    detector = Detector(directory, labels, args.from_scratch)
    before = {n: p.detach().clone() for n, p in detector.model.named_parameters()}
    start = time.perf_counter()
    for epoch in detector.train(train, args):
        seconds = time.perf_counter() - start
        predicted = [label for label, _ in detector.predict([text for _, text in watched])]
        precision, recall, f1 = scores(predicted, watched, positive)
        print(
            f"epoch {epoch}  {positive}: precision {precision:.3f}  recall {recall:.3f}  F1 {f1:.3f}"
            f"  {seconds:.0f} s"
        )
    for name, parameter in detector.model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"
    predicted = [label for label, _ in detector.predict([text for _, text in test])]
    precision, recall, f1 = scores(predicted, test, positive)
    kind = "BERT from scratch" if args.from_scratch else "BERT fine-tuned"
    print(f"test, {kind:18} precision {precision:.3f}  recall {recall:.3f}  F1 {f1:.3f}")
    print(f"test, {'n-gram LinearSVC':18} {linear_svc(train, test, positive)}")
    for text, (label, probability) in zip(NEW, detector.predict(NEW), strict=True):
        print(f"{label:>8} {probability:.3f}  {text}")
    return f1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("messages", type=Path, help="TSV: label, tab, text")
    parser.add_argument("--model", type=Path, help="BERT directory (default: MiniLM)")
    parser.add_argument("--from-scratch", action="store_true", help="without pretrained weights")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute training steps in bfloat16 (default), faster where the processor has it;"
        " weights, their updates and predictions stay float32",
    )
    try:
        run(parser.parse_args(arguments))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
