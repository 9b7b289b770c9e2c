"""Pretrained models with a classifier, their task, and the configuration that names them."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from plugins.text import packages, pretrained
from plugins.text.dataset import Pad, TextDataset
from plugins.text.model import resolve, sequence_classifier
from plugins.text.task import TextClassification
from runner.errors import InputError, Problem

ROOT = Path(__file__).resolve().parents[3]


def problem(*args: Any, **options: Any) -> Problem:
    with pytest.raises(InputError) as caught:
        sequence_classifier(*args, **options)
    (found,) = caught.value.problems
    assert found.fix
    return found


def test_the_body_is_loaded_and_the_head_follows_the_seed(
    tiny: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    caplog.set_level(logging.INFO, "runner")
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(sequence_classifier(tiny, num_labels=3))
    weights = [model.state_dict() for model in models]
    saved = load_file(Path(tiny) / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(weights[0][f"bert.{name}"], tensor), name
    assert {name for name in weights[0] if not name.startswith("bert.")} == {"classifier.weight", "classifier.bias"}
    assert weights[0]["classifier.weight"].shape == (3, 16)
    assert torch.equal(weights[0]["classifier.weight"], weights[1]["classifier.weight"])
    assert not torch.equal(weights[0]["classifier.weight"], weights[2]["classifier.weight"])
    assert all(model.training for model in models)
    assert all(parameter.dtype == torch.float32 for parameter in models[0].parameters())
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{tiny}: new and untrained: classifier.bias, classifier.weight"] * 3
    assert capfd.readouterr() == ("", "")


def test_options_reach_the_model(tiny: str) -> None:
    model: Any = sequence_classifier(tiny, hidden_dropout_prob=0.5, attn_implementation="eager")
    assert model.config.hidden_dropout_prob == 0.5
    assert model.config._attn_implementation == "eager"
    found = problem(tiny, hidden_dropout_probs=0.5)
    assert (found.key, found.value, found.fix) == (
        "model.hidden_dropout_probs", 0.5, "did you mean hidden_dropout_prob?"
    )  # fmt: skip
    assert problem(tiny, trust_remote_code=True).key == "model.trust_remote_code"
    assert problem(tiny, num_labels=0).key == "model.num_labels"


def test_a_half_precision_file_gives_full_precision_weights(tiny: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = sequence_classifier(str(tmp_path / "half"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_classifier_of_another_size(tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "three"
    sequence_classifier(tiny, num_labels=3).save_pretrained(folder)  # type: ignore[operator]
    found = problem(str(folder), num_labels=2)
    assert (found.key, found.value) == ("model.num_labels", 2)
    assert "ignore_mismatched_sizes" in found.fix
    model = sequence_classifier(str(folder), num_labels=2, ignore_mismatched_sizes=True)
    assert model.state_dict()["classifier.weight"].shape == (2, 16)


def test_weights_that_lack_or_exceed_are_told(tiny: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    caplog.set_level(logging.INFO, "runner")
    folder = tmp_path / "odd"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["pooler.dense.bias"]
    save_file({**weights, "decoder.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    sequence_classifier(str(folder))
    said = [(record.levelname, record.getMessage().removeprefix(f"{folder}: ")) for record in caplog.records]
    assert said == [
        ("INFO", "new and untrained: classifier.bias, classifier.weight"),
        ("WARNING", "1 weights of the body are not in the file and start untrained: bert.pooler.dense.bias"),
        ("INFO", "not used by a classifier: decoder.weight"),
    ]
    save_file({"decoder.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "none of its weights fits" in problem(str(folder)).why


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file(tiny: str, tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    (folder / broken).unlink()
    found = problem(str(folder))
    assert (found.key, found.value) == ("model.pretrained", str(folder))
    assert str(folder) in found.why


def test_weights_in_a_pickle_are_not_read(tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    assert problem(str(folder)).key == "model.pretrained"


def test_what_pretrained_may_name(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pretrained.PACKAGED, "minilm-l6", lambda: Path("/packaged"))
    assert resolve(tiny) == Path(tiny)
    assert resolve("minilm-l6") == Path("/packaged")
    assert resolve("google/bert_uncased-1.1") == "google/bert_uncased-1.1"
    (tmp_path / "minilm-l6").mkdir()
    assert resolve("minilm-l6") == tmp_path / "minilm-l6"
    for name in ("./no", "/no/where", "a/b/c", "a b", ""):
        with pytest.raises(InputError, match="no such folder"):
            resolve(name)


def test_a_hub_out_of_reach_is_one_message(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection")

    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    found = problem("someone/some-model")
    assert (found.key, found.value) == ("model.pretrained", "someone/some-model")
    assert found.why == (
        "no such folder here, and the hub does not give it: We couldn't connect to 'https://huggingface.co'"
    )
    assert "minilm-l6" in found.fix
    with pytest.raises(InputError, match="the hub does not give it"):
        TextDataset(["a"], [0], "someone/some-model", 32).lengths  # noqa: B018


def test_a_hubs_tokenizer_is_its_snapshots(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return tiny

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert TextDataset(["a good film"], [0], "someone/some-model", 32).lengths.tolist() == [5]
    assert asked[0][0] == "someone/some-model"
    assert "*.json" in asked[0][1]
    assert not any("safetensors" in pattern for pattern in asked[0][1])


def test_without_transformers_the_remedy_is_named(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = problem(tiny)
    assert (found.key, found.fix) == ("model.pretrained", "pip install transformers")


@pytest.mark.parametrize("pairs", [None, ["fine", "bad", "a film"]])
def test_the_task_trains_the_model(tiny: str, pairs: list[str] | None) -> None:
    torch.manual_seed(0)
    model = sequence_classifier(tiny, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    task = TextClassification(num_classes=2)
    dataset = TextDataset(["a good film", "dull", "bad story"], [1, 0, 0], tiny, 32, pairs)
    batch = Pad(dataset)(dataset.__getitems__([0, 1, 2]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        outputs = model(**task.inputs(batch))
        loss = task.loss(outputs, batch)
        (loss / task.weight(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.1
    assert task.weight(batch) == 3
    assert int(task.tokens(batch)) == int(dataset.lengths.sum())
    outputs = model(**task.inputs(batch))
    expected = cross_entropy(outputs.logits, batch["labels"], reduction="sum")
    assert torch.equal(task.loss(outputs, batch), expected)
    assert torch.as_tensor(task.metrics(outputs, batch)["accuracy"]).tolist() == [True, True, True]
    assert "labels" not in task.inputs(batch)
    # Padding changes nothing: each sample alone gives the same logits.
    for number in range(3):
        alone = Pad(dataset)([dataset[number]])
        logits = model(**task.inputs(alone)).logits
        assert torch.allclose(logits, outputs.logits[number : number + 1], atol=1e-6)


def test_labels_outside_the_classes_are_found_before_tokenising(tiny: str, cache_home: Path) -> None:
    dataset = TextDataset(["a", "b"], [0, 2], tiny, 32)
    (found,) = TextClassification(num_classes=2).check(dataset, "data.train")
    assert found.key == "data.train"
    assert "label 2 of sample 1" in found.why
    assert not cache_home.exists()


def test_every_leaf_of_the_configuration_names_a_target_with_these_arguments() -> None:
    import importlib
    import inspect

    leaves = sorted((ROOT / "plugins" / "text" / "conf").glob("*/*.yaml"))
    assert len(leaves) == 6
    of_data = {"group_by_length", "num_workers", "drop_last"}
    for leaf in leaves:
        text = leaf.read_text()
        assert len(text.splitlines()) < 20
        assert text.startswith("# ")
        said = yaml.safe_load(text)
        module, _, name = said.pop("_target_").rpartition(".")
        target = getattr(importlib.import_module(module), name)
        given = set(said) - (of_data if leaf.parent.name == "data" else set())
        inspect.signature(target).bind(**dict.fromkeys(given))


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    import subprocess

    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import plugins.text; assert 'torch' not in sys.modules\n"
        "import plugins.text.packages, plugins.text.formats; assert 'torch' not in sys.modules\n"
        "import plugins.text.data, plugins.text.model, plugins.text.task\n"
        "heavy = {'transformers', 'tokenizers', 'datasets', 'huggingface_hub', 'hydra', 'omegaconf'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(ROOT)], check=True, timeout=60)


@pytest.mark.network
def test_the_packaged_model_is_a_six_layer_bert() -> None:
    model: Any = sequence_classifier("minilm-l6")
    assert model.config.num_hidden_layers == 6
    assert json.loads((packages.minilm() / "config.json").read_text())["hidden_size"] == 384
