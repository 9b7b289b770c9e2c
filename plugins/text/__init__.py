"""Text: fine-tuning of pretrained models on sentences and sentence pairs."""
