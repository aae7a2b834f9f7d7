"""English sentences for the demo and the examples."""

from __future__ import annotations

import random

# Neighbours mean nearly the same thing in other words.
PAIRS = (
    (
        "The train to Leeds leaves at half past seven.",
        "Departure of the Leeds service is at 7:30.",
    ),
    (
        "My card was charged twice for the same order.",
        "I paid once, but you took the money two times.",
    ),
    (
        "Heavy rain flooded several streets in the old town.",
        "After the downpour, roads in the historic centre were under water.",
    ),
    (
        "She taught herself to play the violin.",
        "Without any teacher, she learned the fiddle.",
    ),
    (
        "The new drug lowered blood pressure in most patients.",
        "In the majority of those treated, hypertension fell.",
    ),
    (
        "Add two eggs and whisk until the batter is smooth.",
        "Beat in a couple of eggs till no lumps remain.",
    ),
)

_OPENINGS = ("hi", "sorry", "quick question", "good morning", "thanks again", "by the way", "well")
_SUBJECTS = (
    "the driver",
    "our neighbour",
    "the second invoice",
    "my sister's laptop",
    "the committee",
    "a parcel from Lisbon",
    "the evening class",
    "the bakery on the corner",
    "her flight",
    "the last version of the report",
)
_VERBS = (
    "arrived before",
    "had nothing to do with",
    "is still waiting for",
    "was mistaken for",
    "depends on",
    "cannot be compared with",
    "costs more than",
    "reminded everybody of",
)
_TAILS = (
    "as far as I can tell",
    "which nobody had expected",
    "and that was in 2019",
    "so please call me back tomorrow",
    "unless it starts to snow",
    "because the key was under the mat",
    "although the manual says otherwise",
)


def generate_sentences(count: int, seed: int = 0) -> list[str]:
    """Grammatical sentences of very different lengths, 3 to about 100 words, most of them short."""
    draw = random.Random(seed)
    sentences = []
    for _ in range(count):
        clauses = []
        for _ in range(min(8, 1 + int(draw.expovariate(0.8)))):
            first, second = draw.sample(_SUBJECTS, 2)
            clause = f"{first} {draw.choice(_VERBS)} {second}"
            if draw.random() < 0.5:
                clause += f", {draw.choice(_TAILS)}"
            clauses.append(clause)
        text = "; ".join(clauses)
        if draw.random() < 0.3:
            opening = draw.choice(_OPENINGS)
            text = opening if len(clauses) == 1 else f"{opening}, {text}"
        sentences.append(text[0].upper() + text[1:] + draw.choice((".", ".", "!", "?")))
    return sentences
