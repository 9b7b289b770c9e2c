"""Tokenising once: the tokens of texts, kept in the user's cache under the hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plugins.text import cache
from plugins.text.pretrained import first_line, quiet_transformers, tokenizer_files, tokenizer_folder, transformers
from runner.errors import wrong

log = logging.getLogger("runner")

#: Changes whenever what a cache file holds changes.
FORMAT = 1

#: Texts tokenised at a time: bounds the memory that Python lists of ids take.
CHUNK = 10_000


@dataclass(frozen=True)
class Tokens:
    """Token ids of all samples one after the other (int32); sample i owns ids[offsets[i]:offsets[i + 1]]."""

    ids: Tensor
    offsets: Tensor
    types: Tensor | None
    pad_id: int


def tokenise(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: str, max_length: int) -> Tokens:
    """The tokens, from the cache where they are there. Of processes that ask together one makes them."""
    folder = tokenizer_folder(tokenizer)
    path = cache.folder("tokens") / f"{_key(texts, pairs, folder, max_length)}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    made: Tokens | None = None
    try:
        with cache.only_one(path) as work:
            found = _read(path)
            if found is None:
                if path.exists():
                    log.warning("the cached tokens %s are damaged: making them again", path)
                made = _make(texts, pairs, folder, max_length)
                _write(made, work / path.name)
                cache.publish(work / path.name, path)
    except OSError as error:
        log.warning("tokens cannot be kept in %s (%s); every start makes them again", path.parent, error)
    return found or made or _make(texts, pairs, folder, max_length)


def _key(texts: Sequence[str], pairs: Sequence[str] | None, folder: Path, max_length: int) -> str:
    """Hash of everything that decides the tokens."""
    digest = hashlib.sha256()
    for part in (
        FORMAT,
        _version("tokenizers"),
        _version("transformers"),
        max_length,
        list(texts),
        pairs and list(pairs),
    ):
        digest.update(json.dumps(part).encode() + b"\n")
    for file in tokenizer_files(folder):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _make(texts: Sequence[str], pairs: Sequence[str] | None, folder: Path, max_length: int) -> Tokens:
    log.info("tokenising %d %s", len(texts), "texts" if pairs is None else "pairs of texts")
    tokenizer = _load(folder)
    _check_length(tokenizer, folder, max_length, pair=pairs is not None)
    with_types = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    ids, types, lengths = [], [], []
    for begin in range(0, len(texts), CHUNK):
        encoded = tokenizer(
            list(texts[begin : begin + CHUNK]),
            list(pairs[begin : begin + CHUNK]) if pairs is not None else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=with_types,
        )
        lengths += [len(row) for row in encoded["input_ids"]]
        ids.append(_flat(encoded["input_ids"], torch.int32))
        if with_types:
            types.append(_flat(encoded["token_type_ids"], torch.int8))
    full = sum(length == max_length for length in lengths)
    if full:
        log.info("%d of %d texts fill data.max_length=%d and may be cut short", full, len(texts), max_length)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return Tokens(torch.cat(ids), offsets, torch.cat(types) if with_types else None, tokenizer.pad_token_id)


def _flat(rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([number for row in rows for number in row], dtype=dtype)


def _load(folder: Path) -> Any:
    library = transformers("data.tokenizer", str(folder))
    try:
        with quiet_transformers():
            tokenizer = library.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the library raises most kinds, its Rust part plain Exception
        raise wrong(
            "model.pretrained",
            f"{folder} holds no tokenizer that transformers can load: {first_line(error)}",
            "give a folder with tokenizer.json (or vocab.txt) and tokenizer_config.json, or a hub name",
            value=str(folder),
        ) from error
    if tokenizer.pad_token_id is None:
        raise wrong(
            "model.pretrained",
            f"the tokenizer in {folder} has no padding token, so that texts cannot be batched",
            'name one in its tokenizer_config.json ("pad_token"), or take another model',
            value=str(folder),
        )
    return tokenizer


def _check_length(tokenizer: Any, folder: Path, max_length: int, pair: bool) -> None:
    least = tokenizer.num_special_tokens_to_add(pair=pair) + 1
    most = min([tokenizer.model_max_length, *_positions(folder)])
    if not least <= max_length <= most:
        raise wrong(
            "data.max_length",
            f"the model in {folder} reads {least} to {most} tokens",
            f"a number from {least} to {most}",
            value=max_length,
        )


def _positions(folder: Path) -> Iterator[int]:
    """How many positions the model has, where its config.json says."""
    try:
        positions = json.loads((folder / "config.json").read_bytes()).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(positions, int) and positions > 0:
        yield positions


def _write(tokens: Tokens, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"ids": tokens.ids, "offsets": tokens.offsets}
    if tokens.types is not None:
        tensors["types"] = tokens.types
    about = {"format": str(FORMAT), "pad_id": str(tokens.pad_id)}
    save_file(tensors, path, metadata={**about, "sha256": _digest(tensors, about)})


def _read(path: Path) -> Tokens | None:
    """What `_write` wrote, mapped into memory; None where it is not there or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            about = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError):
        return None
    if about.pop("sha256", None) != _digest(tensors, about):
        return None
    return Tokens(tensors["ids"], tensors["offsets"], tensors.get("types"), int(about["pad_id"]))


def _digest(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(memoryview(tensors[name].numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
