"""A small BERT directory made by transformers."""

from __future__ import annotations

import pytest

_VOCABULARY = """
the a of and to in is was it for on with as at by from this that not are be have had one two three
four five six seven dog cat house river train word line sentence runs sleeps sees likes green old
new small big slowly quickly never always 1 2 3 2019 un ##believ ##able ##s ##ed ##ing caf ##e naive
, . ! ? ' - # 日 本
"""
WORDS = _VOCABULARY.split()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """Three layers of 32 with four heads, 64 positions; weights large enough to tell errors."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": 64}'
    )
    torch.manual_seed(11)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def oracle(model_directory):
    """Sentence by sentence through transformers: token vectors of all layers, and the pooled one."""
    import torch
    import transformers

    tokenizer = transformers.BertTokenizer.from_pretrained(model_directory)
    model = transformers.BertModel.from_pretrained(model_directory, attn_implementation="eager")
    model = model.double().eval()

    def run(line, max_length=64):
        """(tokens, [L, T, D], [D]) of one line in float64, truncated to max_length tokens."""
        inputs = tokenizer(line, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        layers = torch.stack(output.hidden_states)[:, 0]
        return tokens, layers.numpy(), output.pooler_output[0].numpy()

    return run
