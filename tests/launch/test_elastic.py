"""Several nodes: two network namespaces of one computer that meet at an address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
Node = Callable[..., "subprocess.Popen[str]"]

MINE = """\
import time
from pathlib import Path
from runner import distributed
from runner.train.hook import Hook


class Bad(Hook):
    def __init__(self, once=False):
        self.once = once

    def on_step_end(self, run):
        again = self.once and Path("failed").exists()
        if distributed.rank() == 1 and run.progress.step == 3 and not again:
            Path("failed").touch()
            raise ValueError("boom")


class Slow(Hook):
    def on_step_end(self, run):
        time.sleep(0.1)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, that see each other and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts on one computer need iproute2")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"rt{os.getpid()}a", f"rt{os.getpid()}b"]
    ends = [f"v{os.getpid() % 10**7}{letter}" for letter in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
            for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
                ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)


@pytest.fixture
def node(namespaces: list[str], tmp_path: Path) -> Iterator[Node]:
    """Starts the program in a namespace: node(0, "+recipe=smoke", …)."""
    (tmp_path / "mine.py").write_text(MINE)
    started: list[subprocess.Popen[str]] = []

    def start(number: int, *words: str) -> subprocess.Popen[str]:
        launch = ["launch.nnodes=2", "launch.rdzv_endpoint=10.77.0.1:29400", f"launch.node_rank={number}"]
        program = [sys.executable, "-m", "runner", "+recipe=smoke", "device=cpu", *launch, *words]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", namespaces[number], *program],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_nodes_make_one_run(node: Node, tmp_path: Path) -> None:
    first, second = node(0, "run_dir=r"), node(1, "run_dir=other")
    out, err = first.communicate(timeout=100)
    also, also_err = second.communicate(timeout=20)
    assert (first.returncode, second.returncode) == (0, 0), err + also_err
    assert "x 2 processes" in out
    assert "completed" not in also
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["world_size"] == 2
    assert not (tmp_path / "other").exists()
    assert {"rank_0.log", "rank_1.log"} <= {path.name for path in (tmp_path / "r" / "logs").iterdir()}


def test_both_nodes_tell_the_first_error(node: Node) -> None:
    words = ("run_dir=r", "hooks.bad._target_=mine.Bad")
    first, second = node(0, *words), node(1, *words)
    for process in (second, first):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1, err
        assert err.rstrip().splitlines()[-1].startswith("error: smoke failed after step 3: rank 1 on "), err
        assert err.rstrip().endswith(": ValueError: boom (in hooks.bad)")


def test_a_restart_goes_on_in_the_folder_of_the_first_attempt(node: Node, tmp_path: Path) -> None:
    words = ("launch.max_restarts=2", "checkpoint.every.steps=2", "checkpoint.async=false", "log.every=1")
    words = (*words, "hooks.bad={_target_: mine.Bad, once: true}")
    first, second = node(0, *words), node(1, *words)
    for process in (first, second):
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert "after step 2, from" in (folder / "logs" / "main.log").read_text()


def test_a_signal_to_one_node_ends_both_in_order(node: Node, tmp_path: Path) -> None:
    words = ("run_dir=r", "train.epochs=null", "train.steps=600", "hooks.slow._target_=mine.Slow", "log.every=1")
    first, second = node(0, *words), node(1, *words)
    metrics = tmp_path / "r" / "metrics.jsonl"
    until = time.monotonic() + 90
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)  # `ip netns exec` has become the program itself
    _, err = first.communicate(timeout=30)
    _, also = second.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (75, 75), err + also
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "interrupted"


def test_a_signal_before_the_first_step_where_the_terminal_has_gone(tmp_path: Path) -> None:
    """What is said then finds no reader; the exit code and what is left behind stay the same."""
    (tmp_path / "report").mkdir()
    program = "from pathlib import Path; from runner.launch.elastic import _forward; _forward(Path('report'), 15, None)"
    reader, writer = os.pipe()
    os.close(reader)
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=variables, stderr=writer, timeout=30)
    os.close(writer)
    assert done.returncode == 75
    assert not (tmp_path / "report").exists()
