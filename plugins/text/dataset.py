"""Labelled texts as a map-style data set, tokenised at first use, and what makes a batch of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from plugins.text.tokens import Tokens, tokenise

Sample = dict[str, Any]


class TextDataset:
    """Samples of token ids and a label.

    `labels` are there at once; `lengths` and the samples need the tokens, which are made (or read from the cache)
    when first asked for.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        tokenizer: str,
        max_length: int,
        pairs: Sequence[str] | None = None,
    ) -> None:
        self.texts = texts
        self.pairs = pairs
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.tokenizer = tokenizer
        self.max_length = max_length

    @cached_property
    def tokens(self) -> Tokens:
        return tokenise(self.texts, self.pairs, self.tokenizer, self.max_length)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sample."""
        return self.tokens.offsets.diff()

    @property
    def pad_id(self) -> int:
        return self.tokens.pad_id

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        tokens, at = self.tokens, torch.as_tensor(indices, dtype=torch.int64)
        starts, ends = tokens.offsets[at].tolist(), tokens.offsets[at + 1].tolist()
        samples = [
            {"input_ids": tokens.ids[start:end], "label": label}
            for start, end, label in zip(starts, ends, self.labels[at].tolist(), strict=True)
        ]
        if tokens.types is not None:
            for sample, start, end in zip(samples, starts, ends, strict=True):
                sample["token_type_ids"] = tokens.types[start:end]
        return samples


class Pad:
    """Makes a batch: pads to the longest of its samples.

    The id to pad with may be given as the data set that will know it, so that building one tokenises nothing.
    """

    def __init__(self, pad_id: int | TextDataset) -> None:
        self._pad_id = pad_id

    @property
    def pad_id(self) -> int:
        if isinstance(self._pad_id, TextDataset):
            self._pad_id = self._pad_id.pad_id
        return self._pad_id

    def __getstate__(self) -> dict[str, int]:
        return {"_pad_id": self.pad_id}  # a data worker gets the number, not the data set once more

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        ids = [sample["input_ids"] for sample in samples]
        lengths = torch.tensor([len(row) for row in ids])
        attended = torch.arange(int(lengths.max())) < lengths[:, None]
        batch = {"input_ids": _padded(ids, attended, self.pad_id), "attention_mask": attended.long()}
        if "token_type_ids" in samples[0]:
            batch["token_type_ids"] = _padded([sample["token_type_ids"] for sample in samples], attended, 0)
        batch["labels"] = torch.tensor([sample["label"] for sample in samples])
        return batch


def _padded(rows: Sequence[Tensor], attended: Tensor, fill: int) -> Tensor:
    padded = torch.full(attended.shape, fill, dtype=torch.int64)
    return padded.masked_scatter_(attended, torch.cat(list(rows)).long())
