"""ELMo's options.json, as published and as training writes it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxfast.nn.scalar_mix import ConfigurationError

ACTIVATIONS = ("relu", "tanh")
_LARGEST = 1 << 24  # of any size; what is above is a damaged file


@dataclass(frozen=True)
class ElmoOptions:
    """Sizes of a bidirectional language model (Peters et al., 2018).

    dim:            cells of an LSTM, D;  projection_dim: size of its output and of a token vector, P
    n_layers:       LSTM layers of each direction
    cell_clip, proj_clip: bounds of cell and output, or None
    use_skip_connections: whether a layer from the second on adds its input to its output
    character_dim, filters, n_highway, activation, max_characters_per_token: the token encoder; filters is empty in a
                    model of word ids, whose table has n_tokens_vocab rows beside that of padding
    """

    dim: int
    projection_dim: int
    n_layers: int
    cell_clip: float | None
    proj_clip: float | None
    use_skip_connections: bool
    character_dim: int = 16
    filters: tuple[tuple[int, int], ...] = ()
    n_highway: int = 0
    activation: str = "relu"
    max_characters_per_token: int = 50
    n_tokens_vocab: int | None = None

    @property
    def has_characters(self) -> bool:
        return bool(self.filters)

    @property
    def n_filters(self) -> int:
        return sum(count for _, count in self.filters)

    @property
    def has_projection(self) -> bool:
        """Whether the LSTM projects its output; without, the output has `dim` features."""
        return self.projection_dim < self.dim

    @property
    def output_dim(self) -> int:
        """Features of one direction."""
        return self.projection_dim if self.has_projection else self.dim

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ElmoOptions:
        """Reads options.json. Raises ConfigurationError for a file that is not one, OSError where it cannot be read."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"ElmoOptions: {os.fspath(path)} must be a JSON file, got {error}"
            ) from error
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Any) -> ElmoOptions:
        """Takes the content of options.json; keys that only training needs are ignored."""
        lstm = _section(content, "lstm")
        characters = _section(content, "char_cnn") if content.get("char_cnn") else None
        base = cls(
            dim=_size(lstm, "lstm", "dim"),
            projection_dim=_size(lstm, "lstm", "projection_dim"),
            n_layers=_size(lstm, "lstm", "n_layers", default=1),
            cell_clip=_clip(lstm, "cell_clip"),
            proj_clip=_clip(lstm, "proj_clip"),
            use_skip_connections=_flag(lstm, "use_skip_connections"),
        )
        if base.projection_dim > base.dim:  # layers of different sizes
            raise ConfigurationError(
                "ElmoOptions: lstm.projection_dim must be at most lstm.dim, got "
                f"{base.projection_dim} and {base.dim}"
            )
        if characters is None:
            words = _size(content, "", "n_tokens_vocab")
            return cls(**{**base.__dict__, "n_tokens_vocab": words})
        return cls(**{**base.__dict__, **_characters(characters)})

    def to_dict(self) -> dict[str, Any]:
        """The content of options.json for inference."""
        lstm = {
            "cell_clip": self.cell_clip,
            "use_skip_connections": self.use_skip_connections,
            "n_layers": self.n_layers,
            "proj_clip": self.proj_clip,
            "projection_dim": self.projection_dim,
            "dim": self.dim,
        }
        if not self.has_characters:
            return {"lstm": lstm, "n_tokens_vocab": self.n_tokens_vocab}
        characters = {
            "embedding": {"dim": self.character_dim},
            "filters": [list(pair) for pair in self.filters],
            "n_highway": self.n_highway,
            "n_characters": 262,
            "max_characters_per_token": self.max_characters_per_token,
            "activation": self.activation,
        }
        return {"lstm": lstm, "char_cnn": characters}


def _section(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get(name), dict):
        got = type(content).__name__ if not isinstance(content, dict) else repr(content.get(name))
        raise ConfigurationError(f"ElmoOptions: {name} must be an object, got {got}")
    return content[name]


def _number(section: dict[str, Any], where: str, name: str, default: int | None) -> Any:
    key = f"{where}.{name}".lstrip(".")
    if name not in section and default is None:
        raise ConfigurationError(f"ElmoOptions: {key} must be given, got none")
    value = section.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"ElmoOptions: {key} must be an integer, got {value!r}")
    return value


def _size(
    section: dict[str, Any], where: str, name: str, default: int | None = None, least: int = 1
) -> int:
    value = _number(section, where, name, default)
    if not least <= value <= _LARGEST:
        key = f"{where}.{name}".lstrip(".")
        raise ConfigurationError(
            f"ElmoOptions: {key} must be in [{least}, {_LARGEST}], got {value}"
        )
    return value


def _clip(lstm: dict[str, Any], name: str) -> float | None:
    """0 and null both mean no bound."""
    value = lstm.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigurationError(
            f"ElmoOptions: lstm.{name} must be a number of at least 0 or null, got {value!r}"
        )
    return float(value) or None


def _flag(lstm: dict[str, Any], name: str) -> bool:
    value = lstm.get(name, False)
    if not isinstance(value, bool):
        raise ConfigurationError(f"ElmoOptions: lstm.{name} must be true or false, got {value!r}")
    return value


def _characters(section: dict[str, Any]) -> dict[str, Any]:
    filters = section.get("filters")
    longest = _size(section, "char_cnn", "max_characters_per_token", default=50, least=2)
    if not isinstance(filters, list) or not filters:
        raise ConfigurationError(
            f"ElmoOptions: char_cnn.filters must be a list of pairs, got {filters!r}"
        )
    for pair in filters:
        good = isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
        if not good or not 1 <= pair[0] <= longest or not 1 <= pair[1] <= _LARGEST:
            raise ConfigurationError(
                f"ElmoOptions: char_cnn.filters must be pairs [width, count] with a width of 1 to "
                f"{longest}, got {pair!r}"
            )
    activation = section.get("activation")
    if activation not in ACTIVATIONS:
        raise ConfigurationError(
            f'ElmoOptions: char_cnn.activation must be "relu" or "tanh", got {activation!r}'
        )
    count = _number(section, "char_cnn", "n_characters", 262)
    if count not in (261, 262):
        raise ConfigurationError(
            f"ElmoOptions: char_cnn.n_characters must be 262 (261 in training), got {count}"
        )
    return {
        "character_dim": _size(_section(section, "embedding"), "char_cnn.embedding", "dim"),
        "filters": tuple((width, number) for width, number in filters),
        "n_highway": _size(section, "char_cnn", "n_highway", default=0, least=0),
        "activation": activation,
        "max_characters_per_token": longest,
    }
