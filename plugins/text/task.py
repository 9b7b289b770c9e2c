"""Classification of texts: batches are dicts of padded token ids, a mask and labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from runner.tasks.classification import Classification


class TextClassification(Classification):
    """Batches {input_ids, attention_mask, token_type_ids (pairs only), labels}, as the text data sets make them."""

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Tokens without padding."""
        return batch["attention_mask"].sum()
