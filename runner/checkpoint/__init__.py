"""What is saved, when and where: folders that hold a whole training state, without pickle."""

from runner.checkpoint.checkpointer import Best, Checkpointer, Stateful, extra_of
from runner.checkpoint.failure import SaveFailed
from runner.checkpoint.random_state import RandomState
from runner.checkpoint.store import find, latest

__all__ = ["Best", "Checkpointer", "RandomState", "SaveFailed", "Stateful", "extra_of", "find", "latest"]
