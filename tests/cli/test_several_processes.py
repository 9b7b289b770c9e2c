"""What a user of several processes meets at the command line, end to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from programs import Told, begin, end, living, wait_until

HOST = socket.gethostname()
MINE = (Path(__file__).parent / "mine.py").read_text()
RECIPE = """\
# the next word of a sentence
name: words
model: {_target_: mine.Words}
task: {_target_: mine.Next, meters: {f1: {_target_: runner.metrics.F1, ignore_index: 0}}}
data:
  train: {_target_: mine.Sentences, count: 44}
  eval: {_target_: mine.Sentences, count: 11, seed: 1}
train: {epochs: 2}
batch: {global_size: 16}
log: {every: 1}
"""
TWO = ("device=cpu", "launch.nproc_per_node=2", "run_dir=r")
SMOKE = ("+recipe=smoke", *TWO, "log.every=1")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a module and a recipe of the user's own."""
    return furnished(tmp_path)


def furnished(folder: Path) -> Path:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "words.yaml").write_text(RECIPE)
    (folder / "mine.py").write_text(MINE)
    return folder


def start(home: Path, *words: str, run: str = "r", timeout: float = 120.0, **variables: str) -> Told:
    return end(begin(home, *words, **variables), home / run, timeout)


def alone(folder: Path, *words: str) -> Told:
    """The same run in one process."""
    told = start(folder, *words, "device=cpu", "run_dir=one", run="one")
    assert told.code == 0, told.err
    return told


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return alone(tmp_path_factory.mktemp("smoke"), "+recipe=smoke", "log.every=1")


# --- one recipe on any backend ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "deepspeed"])
def test_two_processes_train_what_one_does(home: Path, smoke: Told, backend: str) -> None:
    told = start(home, *SMOKE, f"backend={backend}", "--json")
    assert told.code == 0, told.err
    summary = json.loads(told.out)  # and nothing else
    assert summary == told.json("summary.json")
    assert told.losses() == pytest.approx(smoke.losses(), rel=1e-5)
    assert told.losses("eval") == pytest.approx(smoke.losses("eval"), rel=1e-5)
    assert (summary["world_size"], summary["backend"], summary["micro_size"]) == (2, backend, 16)
    assert len(summary["peak_memory_bytes"]) == 2
    assert min(summary["peak_memory_bytes"]) > 2**24
    assert told.json("environment.json")["world_size"] == 2
    assert {path.name for path in (told.folder / "logs").iterdir()} == {"main.log", "rank_0.log", "rank_1.log"}
    assert f"name: {backend}" in (told.folder / "config.yaml").read_text()
    alike = smoke.out.replace(": one", ": r").replace("one/summary", "r/summary").replace("single on", f"{backend} on")
    assert [line.split()[:2] for line in told.err.splitlines()] == [line.split()[:2] for line in alike.splitlines()]


UNLIKE = """\
import os

import torch

from runner.data.synthetic import separable_classification


def data(other):
    second = os.environ.get("RANK") == "1"
    if second and other == "version":
        torch.__version__ = "2.1.0"
    samples = 56 if second and other == "length" else 64
    return separable_classification(samples, 16, 4, seed=int(second and other == "contents"))
"""


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("length", "data.train has 64 samples on rank 0 and 56 samples on rank 1"),
        ("version", "rank 1 has torch 2.1.0, and rank 0 has 2."),
    ],
)
def test_processes_that_see_other_things(home: Path, other: str, said: str) -> None:
    """Nothing of it would fail by itself: samples would be missing and double."""
    (home / "unlike.py").write_text(UNLIKE)
    told = start(home, *SMOKE, f"data.train={{_target_: unlike.data, other: {other}}}", "train.steps=4")
    assert told.code == 2
    assert said in " ".join(told.err.split())
    assert told.err.count("fix:") == 1
    assert not told.folder.exists()


def test_processes_whose_samples_differ_are_warned_of(home: Path) -> None:
    """A path in a sample may differ; so this is no error."""
    (home / "unlike.py").write_text(UNLIKE)
    told = start(home, *SMOKE, "data.train={_target_: unlike.data, other: contents}", "train.steps=4")
    assert told.code == 0, told.err
    warning = "warning: data.train has other contents on rank 1 than on rank 0: 16 of 16 samples that were looked at"
    assert told.out.count(warning) == 1


def test_recomputing_compiling_and_one_reader_change_nothing(home: Path) -> None:
    words = ("+recipe=words", "activation_checkpointing=full", "compile={backend: aot_eager, scope: block}")
    told = start(home, *words, *TWO, "data.reader=main", "debug=true")
    assert told.code == 0, told.err
    assert told.err == ""
    for rank in range(2):
        assert told.out.count(f"debug: rank {rank} of 2") == 1
    assert told.out.count("debug: backend ddp, precision fp32") == 1
    one = alone(home, "+recipe=words")
    _equal(told, one)

    # On another backend, and with a micro-batch that is found.
    search = ("backend=fsdp", "activation_checkpointing=selective", "batch.micro_size=auto", "debug=true", "run_dir=f")
    told = start(home, "+recipe=words", *TWO[:2], *search, run="f")
    assert told.code == 0, told.err
    assert "batch.micro_size=auto: 8; accumulation.steps=1, batch.global_size=16" in told.out
    assert told.json("summary.json")["micro_size"] == 8
    assert "units 3 Block" in told.out
    _equal(told, one)


def _equal(told: Told, one: Told) -> None:
    assert told.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert told.losses("eval") == pytest.approx(one.losses("eval"), rel=1e-5)
    found, wanted = (each.json("summary.json")["metrics"] for each in (told, one))
    assert (found["samples"], found["f1"]) == (11, wanted["f1"])


def test_a_stream_is_read_once(home: Path) -> None:
    words = ("data.train={_target_: mine.Stream, count: 100}", "data.eval={_target_: mine.Stream, count: 50}")
    words = ("+recipe=smoke", *words, "log.every=1", "data.reader=main")
    told = start(home, *words, *TWO, "train.steps=5")
    assert told.code == 0, told.err
    assert "  data     a stream, a stream held out\n" in told.out
    assert told.json("summary.json")["metrics"]["samples"] == 50
    assert told.losses() == pytest.approx(alone(home, *words, "train.steps=5").losses(), rel=1e-5)


def test_a_sweep_goes_on_after_a_job_that_cannot_be(home: Path) -> None:
    words = ("+recipe=smoke", *TWO, "backend=deepspeed", "train.steps=2", "precision=fp16,bf16")
    told = start(home, "-m", *words)
    assert told.code == 1
    assert told.err.count("DeepSpeed has no fp16 on a CPU") == 1
    assert told.last == "1 of 2 jobs failed: 0_precision=fp16"
    assert told.out.count("samples/s  seconds") == 1
    assert [job["status"] for job in told.json("sweep.json")["jobs"]] == ["failed", "completed"]
    assert {path.name for path in told.folder.iterdir() if path.is_dir()} == {"1_precision=bf16"}


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "backend", "then"),
    [
        (signal.SIGINT, 130, "ddp", ()),
        (signal.SIGTERM, 75, "fsdp", ("backend=deepspeed", "launch.nproc_per_node=1")),
    ],
)
def test_a_signal_saves_once_and_the_command_goes_on(
    home: Path, smoke: Told, number: int, code: int, backend: str, then: tuple[str, ...]
) -> None:
    words = (*SMOKE, f"backend={backend}", "hooks.slow={_target_: mine.Slow}")
    process = begin(home, *words)
    metrics = home / "r" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
    process.send_signal(number)
    asked = time.monotonic()
    told = end(process, home / "r")
    assert time.monotonic() - asked < 10  # five seconds, on a computer that does nothing else
    assert told.code == code, told.err
    assert told.out.count("to go on: python -m runner +recipe=smoke") == 1
    stopped = told.json("summary.json")["steps"]
    assert [path.name for path in (home / "r" / "checkpoints").iterdir()] == [f"step_{stopped:08d}"]
    told = start(home, *words, *then)
    assert told.code == 0, told.err
    assert f"after step {stopped}" in told.out
    assert told.losses() == pytest.approx(smoke.losses(), rel=1e-5)
    assert told.losses("eval") == pytest.approx(smoke.losses("eval"), rel=1e-5)


def test_a_process_that_is_killed_from_outside(home: Path) -> None:
    process = begin(home, *SMOKE, "hooks.slow={_target_: mine.Slow}")
    metrics = home / "r" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
    workers = sorted(pid for pid, line in living(process.pid).items() if "runner.launch.worker" in line)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    asked = time.monotonic()
    told = end(process, home / "r")
    assert time.monotonic() - asked < 10
    assert told.code == 1
    why = f"rank 1 on {HOST}: killed (SIGKILL), likely out of memory"
    assert why in told.last
    assert told.err.count("\n") == 1
    assert told.json("summary.json")["error"].startswith(why)
    assert told.json("status.json")["reason"].startswith(why)


# --- an error in one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "word", "what", "when"),
    [
        ("fsdp", "model={_target_: mine.Model, where: forward}", "ValueError: no forward", "after step 3"),
        ("deepspeed", "task={_target_: mine.Task, num_classes: 4, where: loss}", "ValueError: no loss", "before its"),
        ("ddp", "data.train={_target_: mine.Data, where: item}", "ValueError: no item", "before its first step"),
        (
            "ddp",
            "hooks.end={_target_: mine.End, how: leave}",
            "ended with exit code 0 and no error, in",
            "after step 3",
        ),
    ],
)
def test_an_error_in_one_process_is_told_last_and_once(
    home: Path, backend: str, word: str, what: str, when: str
) -> None:
    told = start(home, *SMOKE, f"backend={backend}", word)
    assert told.code == 1
    assert told.last.startswith(f"error: smoke failed {when}")
    assert f": rank 1 on {HOST}: {what}" in told.last
    assert told.err.count("Traceback") == ("ValueError" in what)
    assert "gloo" not in told.err
    assert told.json("summary.json")["status"] == "failed"
    assert told.json("summary.json")["error"].startswith(f"rank 1 on {HOST}: {what}")


def test_what_only_one_process_refuses_names_it(home: Path) -> None:
    told = start(home, *SMOKE, "task={_target_: mine.Task, num_classes: 4, where: building}")
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith(f"rank 1 on {HOST}, and no other process:\n1 problem in the configuration\n")
    assert told.err.count("ValueError: no building") == 1
    assert not told.folder.exists()


def test_a_process_that_dies_at_the_start(home: Path) -> None:
    told = start(home, *SMOKE, "hooks.end={_target_: mine.End, how: kill, now: true}")
    assert (told.code, told.out) == (1, "")
    assert told.err.startswith(f"error: smoke failed: rank 1 on {HOST}: killed (SIGKILL)")
    assert not told.folder.exists()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ("batch.global_size=33", "backend=ddp", "backend.stage=3", "launch.nnodes=2", "launch.node_rank=2"),
            [
                "backend.stage = 3 is an option of backend=deepspeed, and backend is ddp",
                "global_size = micro_size x accumulation.steps x processes: 33 = ? x ? x 4 has no whole solution",
                "batch.global_size=32 or batch.global_size=36",
                "launch.rdzv_endpoint = null 2 nodes have to meet somewhere",
                "launch.node_rank = 2 nodes are numbered from 0, and launch.nnodes is 2 fix: 0 to 1",
            ],
        ),
        (
            ("batch.micro_size=5", "launch.nnodes=2", "launch.rdzv_endpoint=there", "device=cuda"),
            [
                "32 = 5 x ? x 4 has no whole solution fix: these would work: batch.micro_size=",
                "launch.rdzv_endpoint = there is not HOST:PORT fix: for example",
                "launch.nproc_per_node = 2 2 processes want a GPU each",
            ],
        ),
        (
            ("backend=single", "precision=fp8", "compile={scope: half, nonsense: 1}"),
            [
                "backend = single trains in one process, and there are 2 fix: backend=ddp, or launch.nproc_per_node=1",
                "precision = fp8 cpu has no float8 matrix products",
                "compile.scope = half is no part of a model fix: one of model, block",
                "compile.nonsense = 1 torch.compile has no option of that name",
            ],
        ),
        (
            ("backend=fsdp", "backend.replicas=3", "precision=tf32", "compile={backend: nonsense}"),
            [
                "backend.replicas = 3 2 processes cannot be 3 groups of equal size fix: one of 1, 2",
                "precision = tf32 cpu has no TF32",
                "compile.backend = nonsense is no backend here fix: one of aot_eager",
            ],
        ),
        (
            ("backend=deepspeed", "precision=fp16"),
            ["precision = fp16 DeepSpeed has no fp16 on a CPU fix: precision=bf16 or precision=fp32"],
        ),
        (
            ("backend=deepspeed", "backend.config_file=other.json"),
            [
                "other.json says zero_optimization.stage = 3, but backend.stage says 2",
                "other.json says train_batch_size = 64, but batch.global_size says 32",
            ],
        ),
        (
            ("backend=deepspeed", "backend.config_file=half.json"),
            ["backend.config_file = half.json is no JSON: Expecting value, line 2, column 1"],
        ),
        (
            ("backend=deepspeed", "backend.config_file=none.json"),
            ["backend.config_file = none.json cannot be read (No such file or directory)"],
        ),
        (
            ("data.train.samples=20", "data.drop_last=true"),
            ["data.drop_last = true leaves nothing: 20 samples are fewer than batch.global_size=32"],
        ),
        (
            ("data.train={_target_: mine.Stream}",),
            ["train.epochs Stream is a stream and has no length", "fix: give train.steps, or the stream a __len__"],
        ),
        (("backend=fsdp", "backend.blocks=[NoSuch]"), ["backend.blocks = [NoSuch]", "fix: one of Linear"]),
        (("activation_checkpointing=full",), ["activation_checkpointing = full the model has no repeated blocks"]),
        (
            ("backend=ddp", "model={_target_: mine.Unused}"),
            [
                "model got no gradient in the first step: spare.weight, spare.bias",
                "fix: backend.find_unused_parameters=true, or freeze them",
            ],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_is_told_once_and_leaves_nothing(home: Path, words: tuple[str, ...], wanted: list[str]) -> None:
    (home / "other.json").write_text(json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 3}}))
    (home / "half.json").write_text('{"a": \n')
    before = {path.name for path in home.iterdir()}
    told = start(home, *SMOKE, *words, timeout=60.0)
    assert told.code == 2, told
    text = " ".join(told.err.split())
    for one in wanted:
        assert text.count(one) == 1, told.err
    assert text.startswith(f"{text.count(' fix: ')} problem")
    assert "Traceback" not in told.err
    assert {path.name for path in home.iterdir()} - {"__pycache__"} == before


def test_a_port_in_use(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ("launch.nnodes=2", f"launch.rdzv_endpoint=127.0.0.1:{taken.getsockname()[1]}", "launch.node_rank=0")
        told = start(home, *SMOKE, *words, timeout=60.0)
    assert (told.code, told.out) == (2, "")
    assert "the 2 nodes did not meet: its port is in use by another program" in " ".join(told.err.split())
    told = start(home, "+recipe=smoke", *TWO[:1], RANK="0", WORLD_SIZE="2")
    assert told.code == 2
    assert "RANK=0, WORLD_SIZE=2, without LOCAL_RANK, MASTER_PORT, MASTER_ADDR" in " ".join(told.err.split())


def test_what_the_first_node_refuses_is_told_on_each(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ("launch.nnodes=2", f"launch.rdzv_endpoint=127.0.0.1:{port}", "launch.timeout=60", "run_dir=r")
    words = ("+recipe=smoke", "device=cpu", *words, "data.train.samples=20", "data.drop_last=true")
    nodes = [begin(home, *words, f"launch.node_rank={number}") for number in range(2)]
    for told in [end(node, home / "r") for node in nodes]:
        assert (told.code, told.out) == (2, "")
        assert told.err.startswith("1 problem in the configuration\n")
        assert told.err.count("20 samples are fewer than batch.global_size=32") == 1
    assert not (home / "r").exists()
