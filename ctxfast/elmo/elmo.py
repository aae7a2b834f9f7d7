"""ELMo as a layer of other models: AllenNLP's Elmo and ElmoTokenEmbedder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxfast.elmo.bilm import ElmoBiLm
from ctxfast.elmo.boundaries import remove_sentence_boundaries
from ctxfast.nn.scalar_mix import ConfigurationError, ScalarMix

logger = logging.getLogger("ctxfast")

PathLike = str | os.PathLike[str]


class Elmo(nn.Module):
    """Deep contextualised word vectors (Peters et al., 2018): learned mixes of a language model's layers.

    options_file, weight_file: as for `ElmoBiLm`; a directory or a zip file and None do as well
    num_output_representations: how many mixes of the layers are given, each with its own weights
    requires_grad: whether the language model is trained too; by default it is frozen and records no graph
    do_layer_norm: normalise the layers before they are mixed
    dropout:       of the results, in training
    vocab_to_cache: words whose layer 0 is computed once; forward then takes their numbers in word_inputs
    keep_sentence_boundaries: whether the vectors of begin and end of sentence stay
    scalar_mix_parameters: weights of the mix before the softmax, fixed; layers that they leave out are not computed
    module:        a language model to use in place of the two files
    """

    def __init__(
        self,
        options_file: PathLike | None = None,
        weight_file: PathLike | None = None,
        num_output_representations: int = 1,
        requires_grad: bool = False,
        do_layer_norm: bool = False,
        dropout: float = 0.5,
        vocab_to_cache: Sequence[str] | None = None,
        keep_sentence_boundaries: bool = False,
        scalar_mix_parameters: Sequence[float] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (
            isinstance(num_output_representations, bool)
            or not isinstance(num_output_representations, int)
            or num_output_representations < 1
        ):
            raise ConfigurationError(
                "Elmo: num_output_representations must be an integer of at least 1, got "
                f"{num_output_representations!r}"
            )
        if module is not None:
            if options_file is not None or weight_file is not None:
                raise ConfigurationError(
                    "Elmo: options_file and weight_file must be None with module, got files"
                )
            self._elmo_lstm = module
        else:
            self._elmo_lstm = ElmoBiLm(
                options_file,
                weight_file,
                requires_grad=requires_grad,
                vocab_to_cache=vocab_to_cache,
            )
        self._has_cached_vocab = vocab_to_cache is not None
        self._keep_sentence_boundaries = keep_sentence_boundaries
        self._dropout = nn.Dropout(p=dropout)
        self._scalar_mixes: list[ScalarMix] = []
        for index in range(num_output_representations):
            mix = ScalarMix(
                self._elmo_lstm.num_layers,  # type: ignore[arg-type]
                do_layer_norm=do_layer_norm,
                initial_scalar_parameters=scalar_mix_parameters,
                trainable=scalar_mix_parameters is None,
            )
            self.add_module(f"scalar_mix_{index}", mix)
        self._representations = num_output_representations

    @property
    def stateful(self) -> bool | str:
        """How the language model carries its states from call to call, see `StatefulModule`."""
        return self._bilm().stateful

    @stateful.setter
    def stateful(self, value: bool | str) -> None:
        self._bilm().stateful = value

    def _bilm(self) -> ElmoBiLm:
        if not isinstance(self._elmo_lstm, ElmoBiLm):
            raise TypeError(
                f"Elmo: module must be an ElmoBiLm to have states, got {type(self._elmo_lstm).__name__}"
            )
        return self._elmo_lstm

    def get_output_dim(self) -> int:
        return self._elmo_lstm.get_output_dim()  # type: ignore[operator]

    @torch.no_grad()
    def warmup(self, inputs: Tensor, repeats: int = 1) -> None:
        """Runs character ids [B, T, 50] and starts every later call from the states they leave: warm, and the same.

        Use a few typical sentences. `stateful` becomes "warm".
        """
        bilm = self._bilm()
        bilm._elmo_lstm.reset_states()
        bilm.stateful = "carry"
        for _ in range(repeats):
            bilm.layers(inputs)
        bilm.stateful = "warm"

    def forward(
        self, inputs: Tensor | None, word_inputs: Tensor | None = None
    ) -> dict[str, list[Tensor] | Tensor]:
        """inputs: character ids [..., T, 50];  word_inputs: [..., T], numbers in vocab_to_cache.

        Returns elmo_representations, num_output_representations tensors [..., T, 2P], and mask [..., T], bool, both
        with T + 2 where boundaries are kept. With word_inputs of a cached vocabulary inputs may be None.
        """
        if word_inputs is not None and not self._has_word_table():
            logger.warning("Word inputs were passed to ELMo but it does not have a cached vocab.")
            word_inputs = None
        leading = word_inputs.shape[:-1] if word_inputs is not None else None
        if inputs is not None:
            leading = inputs.shape[:-2] if not self._takes_words() else inputs.shape[:-1]
            if len(leading) > 1:
                inputs = inputs.reshape(-1, *inputs.shape[len(leading) :])
        if word_inputs is not None and word_inputs.dim() > 2:
            word_inputs = word_inputs.reshape(-1, word_inputs.shape[-1])
        mixes = [getattr(self, f"scalar_mix_{i}") for i in range(self._representations)]
        if isinstance(self._elmo_lstm, ElmoBiLm):
            wanted = max(mix.layers_needed() for mix in mixes)
            layers, mask = self._elmo_lstm.layers(inputs, word_inputs, wanted)
            layers = self._padded(layers)
        else:
            output = self._elmo_lstm(inputs, word_inputs)
            layers, mask = output["activations"], output["mask"]
        representations = []
        inner = mask
        for mix in mixes:
            mixed = mix(layers, mask)
            if not self._keep_sentence_boundaries:
                mixed, inner = remove_sentence_boundaries(mixed, mask)
            representations.append(self._dropout(mixed))
        if leading is not None and len(leading) > 1:
            inner = inner.view(*leading, inner.shape[-1])
            representations = [x.view(*leading, *x.shape[1:]) for x in representations]
        return {"elmo_representations": representations, "mask": inner}

    def _has_word_table(self) -> bool:
        return self._has_cached_vocab or self._takes_words()

    def _takes_words(self) -> bool:
        model = self._elmo_lstm
        return isinstance(model, ElmoBiLm) and not model.options.has_characters

    def _padded(self, layers: Tensor) -> Tensor:
        """Layers that were not computed as zeros: their weight is zero."""
        missing = self._bilm().num_layers - layers.shape[0]
        if not missing:
            return layers
        return torch.cat((layers, layers.new_zeros(1, 1, 1, 1).expand(missing, *layers.shape[1:])))


class ElmoTokenEmbedder(nn.Module):
    """One ELMo vector for each token, optionally projected: AllenNLP's token embedder. Arguments as for `Elmo`.

    projection_dim: size of a linear layer behind, or None
    """

    def __init__(
        self,
        options_file: PathLike | None = None,
        weight_file: PathLike | None = None,
        do_layer_norm: bool = False,
        dropout: float = 0.5,
        requires_grad: bool = False,
        projection_dim: int | None = None,
        vocab_to_cache: Sequence[str] | None = None,
        scalar_mix_parameters: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self._elmo = Elmo(
            options_file,
            weight_file,
            1,
            do_layer_norm=do_layer_norm,
            dropout=dropout,
            requires_grad=requires_grad,
            vocab_to_cache=vocab_to_cache,
            scalar_mix_parameters=scalar_mix_parameters,
        )
        self._projection: nn.Linear | None = None
        self.output_dim = self._elmo.get_output_dim()
        if projection_dim:
            self._projection = nn.Linear(self.output_dim, projection_dim)
            self.output_dim = projection_dim

    def get_output_dim(self) -> int:
        return self.output_dim

    def forward(
        self,
        elmo_tokens: Tensor | None = None,
        word_inputs: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Character ids [..., T, 50] -> [..., T, output_dim]; `inputs` is the older name of elmo_tokens."""
        if elmo_tokens is None:
            elmo_tokens = inputs
        vectors = self._elmo(elmo_tokens, word_inputs)["elmo_representations"][0]
        return vectors if self._projection is None else self._projection(vectors)
