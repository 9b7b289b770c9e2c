"""Tokens are made once, by one process, kept by content; batches are padded to their longest."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from plugins.text import tokens as tokens_module
from plugins.text.dataset import Pad, TextDataset
from plugins.text.tokens import tokenise
from runner.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["a good film", "the plot was not very good.", "dull", ""]
PAIRS = ["fine!", "bad", "a film", "the story"]


def cached(cache_home: Path) -> list[Path]:
    return sorted((cache_home / "runner" / "tokens").glob("*.safetensors"))


def data(tiny: str, pairs: list[str] | None = None, max_length: int = 32) -> TextDataset:
    return TextDataset(TEXTS, [1, 0, 0, 1], tiny, max_length, pairs)


def test_tokens_are_those_of_the_tokenizer(tiny: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny)
    dataset = data(tiny, max_length=6)
    expected = [reference(text, truncation=True, max_length=6)["input_ids"] for text in TEXTS]
    assert [sample["input_ids"].tolist() for sample in dataset.__getitems__([0, 1, 2, 3])] == expected
    assert dataset.lengths.tolist() == [len(row) for row in expected] == [5, 6, 3, 2]
    assert dataset.labels.tolist() == [1, 0, 0, 1]
    assert dataset.labels.dtype == torch.int64
    assert len(dataset) == 4
    assert [sample["label"] for sample in dataset.__getitems__([3, 1])] == [1, 0]
    assert dataset[-1]["input_ids"].tolist() == expected[3]
    with pytest.raises(IndexError):
        dataset[4]


def test_pairs_have_token_types_and_are_cut_together(tiny: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny)
    samples = data(tiny, PAIRS, 8).__getitems__(range(4))
    for sample, text, pair in zip(samples, TEXTS, PAIRS, strict=True):
        expected = reference(text, pair, truncation=True, max_length=8)
        assert sample["input_ids"].tolist() == expected["input_ids"]
        assert sample["token_type_ids"].tolist() == expected["token_type_ids"]


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_a_batch_equals_the_tokenizers_own_padding(tiny: str, pairs: list[str] | None) -> None:
    from transformers import AutoTokenizer

    dataset = data(tiny, pairs)
    batch = Pad(dataset)(dataset.__getitems__([1, 0, 3]))
    expected = AutoTokenizer.from_pretrained(tiny)(
        [TEXTS[i] for i in (1, 0, 3)], pairs and [pairs[i] for i in (1, 0, 3)], padding=True, return_tensors="pt"
    )
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if pairs else [])
    assert list(batch) == [*names, "labels"]
    for name in names:
        assert torch.equal(batch[name], expected[name]), name
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 1, 1]
    assert batch["labels"].dtype == torch.int64


def test_padding_uses_the_id_given() -> None:
    samples = [{"input_ids": torch.tensor([5, 6, 7], dtype=torch.int32), "label": 2}]
    samples.append({"input_ids": torch.tensor([8], dtype=torch.int32), "label": 0})
    batch = Pad(9)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collate_pickles_without_the_data(tiny: str) -> None:
    dataset = data(tiny)
    dataset.texts = ["secret sentence"]
    pickled = pickle.dumps(Pad(dataset))
    assert b"secret" not in pickled
    assert pickle.loads(pickled).pad_id == 0


def test_data_workers_give_the_same_batches(tiny: str) -> None:
    dataset = data(tiny, PAIRS)
    both = [
        [
            {name: tensor.tolist() for name, tensor in batch.items()}
            for batch in DataLoader(dataset, batch_size=2, collate_fn=Pad(dataset), num_workers=workers)  # type: ignore[arg-type]
        ]
        for workers in (0, 1)
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 2


def test_nothing_is_tokenised_for_labels(tiny: str, cache_home: Path) -> None:
    dataset = data(tiny)
    Pad(dataset)
    assert dataset.labels.tolist() == [1, 0, 0, 1]
    assert not cache_home.exists()


def test_the_second_start_reads_the_cache_without_transformers(tiny: str, cache_home: Path) -> None:
    made = data(tiny, PAIRS)
    made.lengths  # noqa: B018
    (path,) = cached(cache_home)
    stamp = path.stat().st_mtime_ns
    script = (
        "import sys, json; sys.path[:0] = [sys.argv[1]]\n"
        "from plugins.text.dataset import TextDataset, Pad\n"
        "texts, pairs, tiny = json.loads(sys.argv[2])\n"
        "d = TextDataset(texts, [1, 0, 0, 1], tiny, 32, pairs)\n"
        "batch = Pad(d)(d.__getitems__([0, 1]))\n"
        "assert 'transformers' not in sys.modules and 'tokenizers' not in sys.modules\n"
        "print(json.dumps([d.lengths.tolist(), batch['input_ids'].tolist(), batch['token_type_ids'].tolist()]))\n"
    )
    command = [sys.executable, "-c", script, str(ROOT), json.dumps([TEXTS, PAIRS, tiny])]
    printed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=True).stdout)
    batch = Pad(made)(made.__getitems__([0, 1]))
    assert printed == [made.lengths.tolist(), batch["input_ids"].tolist(), batch["token_type_ids"].tolist()]
    assert path.stat().st_mtime_ns == stamp


def test_the_key_is_the_content(tiny: str, cache_home: Path, tmp_path: Path) -> None:
    def files_after(texts: list[str], pairs: list[str] | None, tokenizer: str, max_length: int) -> int:
        tokenise(texts, pairs, tokenizer, max_length)
        return len(cached(cache_home))

    assert files_after(TEXTS, None, tiny, 32) == 1
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    assert files_after(list(TEXTS), None, str(copy), 32) == 1
    assert files_after(TEXTS, None, tiny, 31) == 2
    assert files_after(TEXTS[::-1], None, tiny, 32) == 3
    assert files_after(TEXTS, PAIRS, tiny, 32) == 4
    # The same characters, cut elsewhere.
    assert files_after(["a", "b"], None, tiny, 32) == 5
    assert files_after(["ab", ""], None, tiny, 32) == 6
    settings = json.loads((copy / "tokenizer.json").read_text())
    settings["normalizer"]["lowercase"] = False
    (copy / "tokenizer.json").write_text(json.dumps(settings))
    assert files_after(TEXTS, None, str(copy), 32) == 7


def test_damage_is_noticed_and_mended(tiny: str, cache_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = data(tiny).tokens
    (path,) = cached(cache_home)
    whole = path.read_bytes()
    flips = [bytes([byte ^ 4]) for byte in whole]
    damaged = [whole[:at] + flips[at] + whole[at + 1 :] for at in range(0, len(whole), 7)]
    damaged += [whole[:-1], whole[:9], b"", whole + b"x", b"\xff" * 8 + whole[8:]]
    for content in damaged:
        path.write_bytes(content)
        found = tokens_module._read(path)
        assert found is None or (torch.equal(found.ids, expected.ids) and found.pad_id == expected.pad_id)
    path.write_bytes(damaged[-4])
    with caplog.at_level(logging.WARNING, "runner"):
        again = data(tiny).tokens
    assert torch.equal(again.ids, expected.ids)
    assert torch.equal(again.offsets, expected.offsets)
    assert "damaged" in caplog.text
    assert tokens_module._read(path) is not None


def test_processes_that_start_together_tokenise_once(tiny: str, tmp_path: Path, cache_home: Path) -> None:
    script = (
        "import sys, time; sys.path[:0] = [sys.argv[1]]\n"
        "from plugins.text import tokens\n"
        "make = tokens._make\n"
        "def counted(*args):\n"
        "    open(sys.argv[2], 'a').write('made\\n')\n"
        "    time.sleep(1)\n"
        "    return make(*args)\n"
        "tokens._make = counted\n"
        "print(tokens.tokenise(['a good film'] * 50, None, sys.argv[3], 32).ids.sum().item())\n"
    )
    log = tmp_path / "made"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(ROOT), str(log), tiny],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    printed = {worker.communicate(timeout=120)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(printed) == 1
    assert log.read_text() == "made\n"
    assert len(cached(cache_home)) == 1


def test_a_cache_that_cannot_be_written_is_said_and_not_needed(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert data(tiny).lengths.tolist() == [5, 9, 3, 2]
    assert "every start makes them again" in caplog.text


def test_max_length_must_suit_the_model(tiny: str) -> None:
    for max_length, pairs, least in ((33, None, 3), (2, None, 3), (3, PAIRS, 4)):
        with pytest.raises(InputError) as caught:
            data(tiny, pairs, max_length).lengths  # noqa: B018
        (problem,) = caught.value.problems
        assert (problem.key, problem.value) == ("data.max_length", max_length)
        assert f"{least} to 32" in problem.fix


def test_a_folder_without_tokenizer(tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    with pytest.raises(InputError) as caught:
        data(str(folder)).lengths  # noqa: B018
    assert caught.value.problems[0].key == "model.pretrained"
    assert "no tokenizer" in caught.value.problems[0].why


def test_a_tokenizer_without_padding(tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "nopad"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no padding token"):
        data(str(folder)).lengths  # noqa: B018
