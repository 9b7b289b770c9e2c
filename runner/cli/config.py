"""`--cfg job`: the composed configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.cli.train import raise_problems
from runner.errors import wrong
from runner.folder import finite
from runner.recipe.compose import compose, dump
from runner.recipe.overrides import Invocation


def show_config(invocation: Invocation) -> int:
    """Prints the configuration as YAML, or JSON (with --resolve its interpolations resolved), and returns 0.

    Raises InputError where it is wrong, as a run would.
    """
    if invocation.cfg != "job":
        raise wrong("--cfg", "Hydra's own configuration is not used here", "--cfg job", value=invocation.cfg)
    composition = compose(invocation.overrides, directory=Path.cwd(), config_dirs=invocation.config_dirs)
    raise_problems([*invocation.problems, *composition.check()], composition)
    config: Any = composition.config if invocation.resolve else composition.unresolved
    for word in (invocation.package or "").split("."):
        if word and (not isinstance(config, dict) or word not in config):
            raise wrong(
                "--package", "there is no such key", "name a key of the configuration", value=invocation.package
            )
        config = config[word] if word else config
    if invocation.json:
        print(json.dumps(finite(config), indent=2, ensure_ascii=False))
    else:
        print(dump(config), end="")
    return 0
