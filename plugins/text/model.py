"""Pretrained models with a new classifier on top."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plugins.text.pretrained import first_line, hub_refused, quiet_transformers, resolve, transformers
from runner.errors import wrong

__all__ = ["resolve", "sequence_classifier"]

log = logging.getLogger("runner")

#: What from_pretrained itself takes, beside the values of the model's configuration.
LOADING_OPTIONS = ("attn_implementation", "ignore_mismatched_sizes", "revision", "subfolder", "variant")


def sequence_classifier(pretrained: str = "minilm-l6", num_labels: int = 2, **options: Any) -> nn.Module:
    """A pretrained encoder with a new linear classifier, for one text or a pair of texts.

    Args:
        pretrained: a model's folder, `minilm-l6` (6-layer BERT, from the package registry), or a hub name.
        num_labels: how many classes. Weights that the pretrained model lacks follow torch's global seed.
        options: values of the model's own configuration, such as hidden_dropout_prob, or how to load it:
            attn_implementation, ignore_mismatched_sizes, revision, subfolder, variant.
    """
    if options.pop("trust_remote_code", False):
        raise wrong("model.trust_remote_code", "code from a model's folder is never run", "remove it", value=True)
    if num_labels < 1:
        raise wrong("model.num_labels", "a classifier needs classes", "2 or more", value=num_labels)
    place = resolve(pretrained)
    library = transformers("model.pretrained", pretrained)
    loading = {name: options.pop(name) for name in LOADING_OPTIONS if name in options}
    with quiet_transformers():
        config = _config(library, pretrained, place, num_labels, options, loading)
        model, report = _load(library, pretrained, place, config, loading)
    _tell(model, report, pretrained)
    return model.train()


def _config(
    library: Any,
    pretrained: str,
    place: Path | str,
    num_labels: int,
    options: dict[str, Any],
    loading: Mapping[str, Any],
) -> Any:
    finding = {name: loading[name] for name in ("revision", "subfolder") if name in loading}
    try:
        config = library.AutoConfig.from_pretrained(
            str(place), num_labels=num_labels, trust_remote_code=False, **finding
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(pretrained, place, error) from error
    known = config.to_dict()
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *LOADING_OPTIONS], n=1)
            raise wrong(
                f"model.{name}",
                f"{type(config).__name__} has no such value",
                f"did you mean {close[0]}?" if close else "remove it",
                value=value,
            )
        setattr(config, name, value)
    return config


def _load(
    library: Any, pretrained: str, place: Path | str, config: Any, loading: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    try:
        return library.AutoModelForSequenceClassification.from_pretrained(
            str(place),
            config=config,
            dtype=torch.float32,  # the run's precision decides, not the file's
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            trust_remote_code=False,
            **loading,
        )
    except RuntimeError as error:
        if "size" not in str(error):
            raise
        raise wrong(
            "model.num_labels",
            f"weights of {place} have other shapes than a model of {config.num_labels} labels: {first_line(error)}",
            "give model.num_labels as the weights have it, or model.ignore_mismatched_sizes=true to start those anew",
            value=config.num_labels,
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(pretrained, place, error) from error


def _not_loaded(pretrained: str, place: Path | str, error: Exception) -> Exception:
    if isinstance(place, str):
        return hub_refused(pretrained, error)
    return wrong(
        "model.pretrained",
        f"{place} holds no model for sequence classification that transformers can load: {first_line(error)}",
        "give a folder with config.json and model.safetensors",
        value=pretrained,
    )


def _tell(model: nn.Module, report: Mapping[str, Any], pretrained: str) -> None:
    """Which weights are new or left over: the classifier is expected to be new, anything else is said."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    fresh = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    ours = dict(model.named_parameters()).keys() & {name for name in fresh if name.startswith(body)}
    if ours and len(ours) == sum(name.startswith(body) for name, _ in model.named_parameters()):
        raise wrong(
            "model.pretrained",
            f"none of its weights fits a {type(model).__name__}; it has, for example, "
            f"{_some(report['unexpected_keys'])}",
            "give a model of the architecture that its config.json names",
            value=pretrained,
        )
    new = sorted(fresh - ours)
    if new:
        log.info("%s: new and untrained: %s", pretrained, _some(new))
    if ours:
        log.warning(
            "%s: %d weights of the body are not in the file and start untrained: %s", pretrained, len(ours), _some(ours)
        )
    if report["unexpected_keys"]:
        log.info("%s: not used by a classifier: %s", pretrained, _some(report["unexpected_keys"]))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
