"""Which modules of a model are handled one at a time: sharded, compiled or recomputed as a unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from runner.errors import wrong

Named = tuple[str, nn.Module]

#: Modules that only hold others; ModuleList and ModuleDict have no forward of their own.
_HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
#: Layers outside of blocks that are worth a unit of their own when they are big: their weights are read by their own
#: forward alone. Subclasses are left out: torch's attention reads the weight of its own kind of Linear from outside.
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BIG_LAYER = 1_000_000
#: Classes of repeated blocks count where they hold at least this share of what all repeated blocks hold.
_SHARE = 0.1


def blocks_of(model: nn.Module, names: Sequence[str] | None = None) -> list[Named]:
    """The model's blocks with their full names, outer before inner.

    With `names`, all modules of these classes. Else the repeated blocks: the outermost elements of ModuleList,
    ModuleDict and Sequential that stand there with others of their class, single layers of torch's left out; classes
    that hold only a small share of the parameters are left out too. A model may have none.

    Raises InputError where a name fits no module.
    """
    return _by_class(model, names) if names is not None else _repeated(model)


def blocks_by_size(model: nn.Module, min_parameters: int) -> list[Named]:
    """Modules that hold at least `min_parameters` outside of smaller such modules inside them; outer before inner."""
    found: list[Named] = []

    def visit(name: str, module: nn.Module) -> set[int]:
        """The parameters that are in no block yet."""
        left = {id(p) for p in module.parameters(recurse=False)}
        for child_name, child in module.named_children():
            left |= visit(f"{name}.{child_name}".lstrip("."), child)
        sizes = {id(p): p.numel() for p in module.parameters()}
        if module is model or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return left
        if sum(sizes[key] for key in left) < min_parameters:
            return left
        found.append((name, module))
        return set()

    visit("", model)
    return found[::-1]


def units_of(model: nn.Module, names: Sequence[str] | None = None, min_parameters: int | None = None) -> list[Named]:
    """The modules to shard as units below the model itself, outer before inner.

    By class names, by size, or both; with neither the model's repeated blocks and big layers outside of them. A module
    that shares a parameter with a place outside of it is none: the parameter would be sharded twice.
    """
    if names is None and min_parameters is None:
        units = _repeated(model)
        mean = sum(_size(block) for _, block in units) / max(len(units), 1)
        units += _big_layers(model, units, max(mean, _BIG_LAYER))
    else:
        units = [] if names is None else _by_class(model, names)
        if min_parameters is not None:
            known = {id(module) for _, module in units}
            units += [unit for unit in blocks_by_size(model, min_parameters) if id(unit[1]) not in known]
    chosen = {id(module) for _, module in units}
    places = _places(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if id(module) in chosen and module is not model and _closed(module, places)
    ]


def bare(module: nn.Module) -> nn.Module:
    """The module inside of wrappers for compilation and recomputation."""
    while True:
        inner = module._modules.get("_orig_mod") or module._modules.get("_checkpoint_wrapped_module")
        if inner is None:
            return module
        module = inner


def _by_class(model: nn.Module, names: Sequence[str]) -> list[Named]:
    found: list[Named] = []
    inside: set[int] = set()  # of wrappers that stand for them
    seen: set[str] = set()
    for name, module in model.named_modules():
        core = bare(module)
        if core is not module:
            inside |= {id(m) for m in _chain(module)}
        if id(module) in inside:
            continue
        kind = type(core)
        matching = {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"} & set(names)
        if matching:
            seen |= matching
            found.append((name, module))
    missing = [name for name in names if name not in seen]
    if missing:
        why = f"no module of the model is a {' or a '.join(missing)}"
        raise wrong("backend.blocks", why, f"one of {', '.join(_classes(model))}", value=list(names))
    return found


def _chain(module: nn.Module) -> Iterable[nn.Module]:
    """What a wrapper wraps, down to the user's module."""
    while True:
        inner = module._modules.get("_orig_mod") or module._modules.get("_checkpoint_wrapped_module")
        if inner is None:
            return
        yield inner
        module = inner


def _classes(model: nn.Module, most: int = 12) -> list[str]:
    """Names of the classes inside a model that could be blocks: repeated blocks, then others by what they hold."""
    repeated = {type(bare(module)).__name__: None for _, module in _repeated(model)}
    sizes: Counter[str] = Counter()
    for _, module in model.named_modules():
        if module is not model and bare(module) is module and not isinstance(module, _HOLDERS):
            sizes[type(module).__name__] += _size(module)
    others = [name for name, size in sizes.most_common() if size and name not in repeated]
    return [*repeated, *others][:most]


def _repeated(model: nn.Module) -> list[Named]:
    candidates: list[Named] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        counts = (
            Counter(type(bare(child)) for child in module.children()) if isinstance(module, _HOLDERS) else Counter()
        )
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}".lstrip(".")
            if id(child) in seen:
                continue
            seen.add(id(child))
            core = bare(child)
            if counts[type(core)] > 1 and not isinstance(core, _HOLDERS) and _is_block(core):
                candidates.append((full, child))
            else:
                visit(full, child)

    visit("", model)
    held: Counter[type] = Counter()
    for _, module in candidates:
        held[type(bare(module))] += _size(module)
    least = _SHARE * held.total()
    return [(name, module) for name, module in candidates if held[type(bare(module))] >= least]


def _is_block(module: nn.Module) -> bool:
    """Whether it is more than one layer of torch's, and has something to shard."""
    single = type(module).__module__.startswith("torch.nn.modules") and not any(True for _ in module.children())
    return not single and any(True for _ in module.parameters())


def _big_layers(model: nn.Module, units: Sequence[Named], least: float) -> list[Named]:
    inside = {id(module) for _, unit in units for module in unit.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in _LAYERS and id(module) not in inside and _size(module) >= least
    ]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _places(module: nn.Module) -> Counter[int]:
    """In how many places below a module each of its parameters stands."""
    return Counter(id(p) for inner in module.modules() for p in inner._parameters.values() if p is not None)


def _closed(module: nn.Module, places: Counter[int]) -> bool:
    return all(places[key] == count for key, count in _places(module).items())
