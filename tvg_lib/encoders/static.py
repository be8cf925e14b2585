"""A weak sentence encoder: the mean of word-piece vectors that know no context.

The input embeddings of all-MiniLM-L6-v2 without its six layers, each weighted by how rare its word
piece is in English text as the vocabulary's order tells it (Zipf's law: the r-th most frequent
piece has a share of about 1/r; smooth inverse frequency, Arora et al. 2017). Table 4 of A2FA +
F2SGD compares encoders of different strength; this is the weaker one. It needs no forward pass:
about a hundred thousand sentences a minute.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tvg_lib.encoders.sentence import find_minilm
from tvg_lib.errors import DataError


@dataclass(frozen=True)
class StaticWords:
    """Mean of context-free word-piece vectors; a `SentenceEncoder`.

    Attributes:
        strength: of the weighting a / (a + share of the piece); smaller spares fewer common ones.
    """

    strength: float = 1e-3

    name = "static-MiniLM-words"
    dim = 384

    @cached_property
    def _parts(self) -> tuple[object, np.ndarray]:
        """The tokenizer and the (V, 384) weighted vectors of all word pieces."""
        from pathlib import Path

        from huggingface_hub import snapshot_download
        from safetensors import safe_open
        from tokenizers import Tokenizer

        found = find_minilm()
        folder = Path(found) if Path(found).is_dir() else Path(snapshot_download(found))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        with safe_open(str(folder / "model.safetensors"), "numpy") as file:
            table = file.get_tensor("embeddings.word_embeddings.weight").astype(np.float32)
        # Word pieces are listed by frequency from "the" on; what stands before are signs.
        rank = np.maximum(np.arange(len(table)) - tokenizer.token_to_id("the"), 0) + 2.7
        share = 1 / (rank * np.log(1.78 * len(table)))
        table = table - table.mean(0)
        weights = self.strength / (self.strength + share)
        return tokenizer, (table * weights[:, None]).astype(np.float32)

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, 384) float32 unit vectors.

        Raises:
            DataError: a sentence has no word piece.
        """
        rows = np.empty((len(sentences), self.dim), np.float32)
        for row, pieces in enumerate(self.encode_tokens(sentences)):
            mean = pieces.mean(0)
            rows[row] = mean / max(float(np.linalg.norm(mean)), 1e-8)
        return rows

    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """N arrays (K, 384) float32, one row per word piece, without [CLS] and [SEP].

        Raises:
            DataError: a sentence has no word piece.
        """
        tokenizer, table = self._parts
        found = []
        for encoding, sentence in zip(
            tokenizer.encode_batch(list(sentences), add_special_tokens=False),
            sentences,
            strict=True,
        ):
            if not encoding.ids:
                raise DataError(f"the sentence {sentence!r} has no word piece the encoder knows")
            found.append(table[encoding.ids])
        return found
