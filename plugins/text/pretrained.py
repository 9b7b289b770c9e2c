"""What `model.pretrained` names, for model and tokenizer alike: a folder, the packaged default, or a hub's model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from plugins.text import packages
from runner.errors import InputError, wrong

#: Models that a package of the registry carries: name -> what gives their folder.
PACKAGED = {"minilm-l6": packages.minilm}

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TOKENIZER_ENDINGS = {".json", ".txt", ".model", ".tiktoken", ".bpe", ".jinja"}


def check(pretrained: str) -> None:
    """Refuses at once, without fetching anything, what can be no model's name."""
    is_folder = pretrained != "" and Path(pretrained).expanduser().is_dir()  # "" would be the current folder
    if not is_folder and not _HUB_NAME.fullmatch(pretrained):
        raise _unknown(pretrained, "no such folder")


def resolve(pretrained: str) -> Path | str:
    """An existing folder, the folder of a packaged model (fetched at first use), or a name for the hub."""
    check(pretrained)
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return folder.absolute()
    return PACKAGED[pretrained]() if pretrained in PACKAGED else pretrained


def tokenizer_folder(pretrained: str) -> Path:
    """A folder with the tokenizer's files; of a hub's model these alone are fetched."""
    place = resolve(pretrained)
    if isinstance(place, Path):
        return place
    transformers("model.pretrained", pretrained)  # brings the hub's client
    from huggingface_hub import snapshot_download

    try:
        wanted = [f"*{ending}" for ending in sorted(_TOKENIZER_ENDINGS)]
        return Path(snapshot_download(place, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise hub_refused(pretrained, error) from error


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide what a tokenizer does: all small ones that can, in a fixed order."""
    return sorted(path for path in folder.iterdir() if path.suffix in _TOKENIZER_ENDINGS and path.is_file())


def hub_refused(pretrained: str, error: Exception) -> InputError:
    return _unknown(pretrained, f"no such folder here, and the hub does not give it: {first_line(error)}")


def _unknown(pretrained: str, why: str) -> InputError:
    return wrong(
        "model.pretrained",
        why,
        f"give the path of a folder with config.json, model.safetensors and tokenizer.json, "
        f"{' or '.join(PACKAGED)} (from the package registry), or, where a hub is in reach, a name there",
        value=pretrained,
    )


def transformers(key: str, value: str) -> ModuleType:
    """The library, imported where it is needed; it takes more than a second."""
    try:
        import transformers
    except ImportError as error:
        raise wrong(
            key, f"this needs a package that is not installed: {error}", "pip install transformers", value=value
        ) from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's own reports and progress bars: what matters of them is said in our words."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
