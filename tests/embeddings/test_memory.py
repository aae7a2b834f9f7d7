"""Memory does not grow with the number of lines."""

import json
import os
import random
import subprocess
import sys

import pytest

from ctxfast import load_embeddings
from tests.embeddings.conftest import WORDS

RUN = """
import json, resource, sys
from ctxfast.embeddings import EmbedOptions, embed_file
options = EmbedOptions(pooling="tokens", layers="all")
report = embed_file(*sys.argv[1:4], options)
print(json.dumps([report.tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def peak(model_directory, path, lines, suffix):
    draw = random.Random(0)
    plain = [word for word in WORDS if word.isalpha()]
    text = path / f"{lines}.txt"
    text.write_text(
        "".join(" ".join(draw.choices(plain, k=draw.randint(1, 18))) + "\n" for _ in range(lines))
    )
    output = path / f"{lines}{suffix}"
    arguments = [sys.executable, "-c", RUN, str(model_directory), str(text), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=True, timeout=400, env=environment
    )
    tokens, megabytes = json.loads(done.stdout)
    assert len(load_embeddings(output)) == lines
    return tokens, megabytes


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_fifty_thousand_lines_in_bounded_memory(model_directory, tmp_path, suffix):
    _, small = peak(model_directory, tmp_path, 5000, suffix)
    tokens, large = peak(model_directory, tmp_path, 50_000, suffix)
    written = tokens * 4 * 32 * 4 / 2**20  # megabytes of vectors, [T, 4, 32] in float32
    assert written > 250
    assert large - small < written / 4
