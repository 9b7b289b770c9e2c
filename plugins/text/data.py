"""Data sets of labelled texts: movie reviews, files of the user's own, GLUE."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.text import formats, packages
from plugins.text.dataset import Pad, TextDataset
from plugins.text.pretrained import check, first_line
from runner.errors import InputError, Problem, wrong

__all__ = ["Pad", "TextData", "TextDataset", "glue", "movie_reviews", "text_files"]

log = logging.getLogger("runner")


@dataclass(frozen=True)
class TextData:
    """What training reads: samples to learn from, held-out samples, and what makes a batch of some."""

    train: TextDataset
    eval: TextDataset | None
    collate: Pad


@dataclass(frozen=True)
class _Labelled:
    """Texts with labels as integers, before they are tokenised."""

    texts: Sequence[str]
    labels: Sequence[int]
    pairs: Sequence[str] | None = None


def _text_data(train: _Labelled, held_out: _Labelled | None, tokenizer: str, max_length: int) -> TextData:
    check(tokenizer)
    if max_length < 1:
        raise wrong("data.max_length", "a text has at least one token", "128, for example", value=max_length)
    train_set = _dataset(train, tokenizer, max_length)
    eval_set = _dataset(held_out, tokenizer, max_length) if held_out is not None else None
    return TextData(train_set, eval_set, Pad(train_set))


def _dataset(part: _Labelled, tokenizer: str, max_length: int) -> TextDataset:
    return TextDataset(part.texts, part.labels, tokenizer, max_length, part.pairs)


def movie_reviews(
    tokenizer: str = "minilm-l6", max_length: int = 128, held_out: int = 1000, split_seed: int = 0
) -> TextData:
    """10,072 sentences of movie reviews that people rated: positive (1) or negative (0).

    The sentences are Pang and Lee's, of which SST is made too; the ratings, means of about 20 people, come with the
    package vaderSentiment. Ratings nearer to neutral than 0.5 are left out.

    Args:
        tokenizer: as model.pretrained.
        max_length: tokens after which a sentence is cut.
        held_out: how many sentences are kept for evaluation.
        split_seed: which ones; the same number always gives the same split.
    """
    rated = [row for row in _rated_sentences(packages.movie_reviews()) if abs(row[1]) >= 0.5]
    if not 1 <= held_out < len(rated):
        raise wrong("data.held_out", f"there are {len(rated)} sentences", f"1 to {len(rated) - 1}", value=held_out)
    chosen = _hold_out([text for text, _ in rated], held_out, split_seed)
    parts: tuple[list[tuple[str, float]], list[tuple[str, float]]] = ([], [])
    for number, row in enumerate(rated):
        parts[number in chosen].append(row)
    train, held = (_Labelled([text for text, _ in part], [int(rating > 0) for _, rating in part]) for part in parts)
    return _text_data(train, held, tokenizer, max_length)


def _rated_sentences(path: Path) -> list[tuple[str, float]]:
    # The file passes for Latin-1, but each of its 133 lines beyond ASCII is UTF-8, which also reads as words.
    # Not splitlines(): that would break at control characters within texts as well.
    lines = path.read_bytes().decode("utf-8").split("\n")
    rows = [line.rstrip("\r").split("\t") for line in lines if line]
    return [(text, float(rating)) for _, rating, text in rows]


def _hold_out(texts: Sequence[str], count: int, seed: int) -> set[int]:
    """Exactly `count` numbers of texts, chosen by hash; the same text is never on both sides."""
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(text, []).append(number)
    order = sorted(groups.values(), key=lambda group: hashlib.sha256(f"{seed}:{group[0]}".encode()).digest())
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    return chosen


def text_files(
    train: str,
    eval: str | None = None,
    tokenizer: str = "minilm-l6",
    text: str = "sentence",
    pair: str | None = None,
    label: str = "label",
    format: str | None = None,
    labels: Sequence[str | int] | None = None,
    max_length: int = 128,
) -> TextData:
    """Texts of one's own, in files with a header: TSV as GLUE has it (nothing quoted), CSV, or JSON lines.

    Args:
        train: file to learn from.
        eval: file to evaluate on, or null.
        tokenizer: as model.pretrained.
        text: name of the column with the text.
        pair: name of the column with the second text, for pairs.
        label: name of the column with the label: integers are taken as they are, words numbered in sorted order.
        format: tsv, csv or jsonl; default: what the file's name ends with.
        labels: all labels in the order of their numbers, instead.
        max_length: tokens after which a text (or pair) is cut.
    """
    columns = formats.Columns(text, label, pair)
    paths = {f"data.{name}": path for name, path in (("train", train), ("eval", eval)) if path is not None}
    tables = _all_or_problems(
        lambda key: formats.read(paths[key], key, columns, format, as_text=labels is not None), list(paths)
    )
    known = _known_labels(tables[0], labels)
    numbers = _all_or_problems(
        lambda at: _numbered(tables[at], list(paths)[at], known, labels is not None), range(len(tables))
    )
    parts = [_Labelled(table.texts, numbered, table.pairs) for table, numbered in zip(tables, numbers, strict=True)]
    return _text_data(parts[0], parts[1] if len(parts) > 1 else None, tokenizer, max_length)


def _all_or_problems(work: Any, items: Sequence[Any]) -> list[Any]:
    """`work` of each item; where several are wrong, all their problems in one error."""
    done, problems = [], list[Problem]()
    for item in items:
        try:
            done.append(work(item))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*dict.fromkeys(problems))
    return done


def _known_labels(train: formats.Table, given: Sequence[str | int] | None) -> dict[str | int, int]:
    """Label in the file -> its number."""
    if given is None:
        names: list[Any] = sorted(set(train.labels))
        known: dict[str | int, int] = {name: name if isinstance(name, int) else at for at, name in enumerate(names)}
        if isinstance(names[0], str):
            log.info("labels: %s", ", ".join(f"{name} = {number}" for name, number in known.items()))
        return known
    known = {str(name): number for number, name in enumerate(given)}
    if len(known) != len(given) or not known:
        raise wrong("data.labels", "labels are listed once each", "list each label once", value=list(given))
    return known


def _numbered(table: formats.Table, key: str, known: dict[str | int, int], listed: bool) -> list[int]:
    for line, label in zip(table.lines, table.labels, strict=True):
        if label not in known:
            where = "data.labels has" if listed else "the training file has"
            raise wrong(
                key,
                f"{table.path}:{line}: the label {label!r} is not one that {where}: {_few(known)}",
                "mend it, or list all labels in the order of their numbers: data.labels=[…]",
                value=str(table.path),
            )
    return [known[label] for label in table.labels]


def _few(names: Sequence[Any] | dict[Any, Any]) -> str:
    shown = [repr(name) for name in list(names)[:10]]
    return ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


#: GLUE's tasks of classification -> the columns with texts, and the split to evaluate on.
GLUE = {
    "cola": (("sentence",), "validation"),
    "sst2": (("sentence",), "validation"),
    "mrpc": (("sentence1", "sentence2"), "validation"),
    "qqp": (("question1", "question2"), "validation"),
    "mnli": (("premise", "hypothesis"), "validation_matched"),
    "qnli": (("question", "sentence"), "validation"),
    "rte": (("sentence1", "sentence2"), "validation"),
    "wnli": (("sentence1", "sentence2"), "validation"),
}


def glue(
    tokenizer: str = "minilm-l6", task: str = "sst2", path: str = "nyu-mll/glue", max_length: int = 128
) -> TextData:
    """A task of the GLUE benchmark, from the hub through the `datasets` library.

    Args:
        tokenizer: as model.pretrained.
        task: cola, sst2, mrpc, qqp, mnli, qnli, rte or wnli.
        path: its name at the hub, or a folder that `DatasetDict.save_to_disk` wrote.
        max_length: tokens after which a text (or pair) is cut.
    """
    if task not in GLUE:
        raise wrong("data.task", "no such task of classification in GLUE", f"one of {', '.join(GLUE)}", value=task)
    columns, eval_split = GLUE[task]
    splits = _load_splits(path, task)
    parts = []
    for name in ("train", eval_split):
        if name not in splits or not {*columns, "label"} <= {*splits[name].column_names}:
            raise wrong(
                "data.path",
                f"no split {name} with columns {', '.join(columns)}, label",
                f"give the data set of GLUE's task {task}",
                value=path,
            )
        rows = splits[name][:]
        parts.append(_Labelled(rows[columns[0]], rows["label"], rows[columns[1]] if len(columns) > 1 else None))
    return _text_data(parts[0], parts[1], tokenizer, max_length)


def _load_splits(path: str, task: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise wrong(
            "data.task", f"this needs a package that is not installed: {error}", "pip install datasets", value=task
        ) from error
    if Path(path).suffix == ".py" or (Path(path) / f"{Path(path).name}.py").is_file():
        raise wrong(
            "data.path",
            "data sets with a loading script of their own are not loaded: the script would be run",
            f'datasets.load_dataset("nyu-mll/glue", "{task}").save_to_disk(FOLDER) makes a copy that needs none',
            value=path,
        )
    try:
        if (Path(path) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, task)
    except (OSError, ValueError, RuntimeError) as error:
        raise wrong(
            "data.path",
            f"the data set of GLUE's task {task} cannot be had: {first_line(error)}",
            "a hub must be in reach the first time; without one use data=movie_reviews, files of your own "
            "(data=text_files data.train=FILE data.eval=FILE), or a copy that "
            f'datasets.load_dataset("nyu-mll/glue", "{task}").save_to_disk(FOLDER) made elsewhere (data.path=FOLDER)',
            value=path,
        ) from error
