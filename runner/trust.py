"""What a recipe from elsewhere may build: the reviewed list of names, and the check of what a name turned out to be.

A recipe from elsewhere is bound to this list by the name it writes, before anything is imported, and by the object
that was found, before it is called. Left out on purpose: what reads or writes files, loads code or unpickles, and what
calls a function that its arguments name.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from runner import build
from runner.errors import InputError, Problem

#: Module -> names in it.
_LISTED = {
    "runner.tasks.classification": "Classification",
    "runner.tasks.regression": "Regression",
    "runner.data.synthetic": "random_classification separable_classification",
    "runner.data.collate": "collate",
    "runner.train.schedules": "linear cosine constant",
    "runner.hooks.early_stop": "EarlyStop",
    "runner.hooks.ema": "EMA",
    "runner.hooks.evaluation": "Evaluation",
    "runner.hooks.gradient_norm": "GradientNorm",
    "runner.hooks.learning_rate": "LearningRate",
    "runner.hooks.metrics_log": "MetricsLog",
    "runner.hooks.profiler": "Profiler",
    "runner.hooks.progress": "Progress",
    "runner.hooks.throughput": "Throughput",
    "runner.trackers.jsonl": "Jsonl",
    "runner.trackers.tensorboard": "TensorBoard",
    "torch.nn": """
        AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
        AvgPool1d AvgPool2d AvgPool3d FractionalMaxPool2d FractionalMaxPool3d LPPool1d LPPool2d LPPool3d
        MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d
        Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Fold Unfold
        LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d
        BatchNorm1d BatchNorm2d BatchNorm3d CrossMapLRN2d GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d
        LayerNorm LocalResponseNorm RMSNorm SyncBatchNorm
        LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d
        Bilinear Embedding EmbeddingBag Identity LazyLinear Linear
        GRU GRUCell LSTM LSTMCell RNN RNNCell
        MultiheadAttention Transformer TransformerDecoder TransformerDecoderLayer TransformerEncoder
        TransformerEncoderLayer
        CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish PReLU RReLU
        ReLU ReLU6 SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
        AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout
        CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d
        ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
        ChannelShuffle Flatten PixelShuffle PixelUnshuffle Unflatten Upsample UpsamplingBilinear2d UpsamplingNearest2d
        CosineSimilarity PairwiseDistance
        AdaptiveLogSoftmaxWithLoss BCELoss BCEWithLogitsLoss CTCLoss CosineEmbeddingLoss CrossEntropyLoss
        GaussianNLLLoss HingeEmbeddingLoss HuberLoss KLDivLoss L1Loss MSELoss MarginRankingLoss MultiLabelMarginLoss
        MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss PoissonNLLLoss SmoothL1Loss SoftMarginLoss TripletMarginLoss
        ModuleDict ModuleList Sequential
    """,
    "torch.optim": """
        ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam
    """,
    "torch.optim.lr_scheduler": """
        ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR LinearLR
        MultiStepLR OneCycleLR PolynomialLR ReduceLROnPlateau SequentialLR StepLR
    """,
    "transformers": """
        AutoConfig.from_pretrained
        AutoModel.from_config AutoModel.from_pretrained
        AutoModelForCausalLM.from_config AutoModelForCausalLM.from_pretrained
        AutoModelForImageClassification.from_config AutoModelForImageClassification.from_pretrained
        AutoModelForMaskedLM.from_config AutoModelForMaskedLM.from_pretrained
        AutoModelForQuestionAnswering.from_config AutoModelForQuestionAnswering.from_pretrained
        AutoModelForSeq2SeqLM.from_config AutoModelForSeq2SeqLM.from_pretrained
        AutoModelForSequenceClassification.from_config AutoModelForSequenceClassification.from_pretrained
        AutoModelForTokenClassification.from_config AutoModelForTokenClassification.from_pretrained
    """,
}

#: What these may be called with: of their many options some load code.
_HUB_ARGUMENTS = frozenset({"pretrained_model_name_or_path", "config", "revision", "subfolder", "num_labels"})

#: Arguments by which libraries load code or unpickle; their truth is refused wherever a recipe from elsewhere says it.
CODE_ARGUMENTS = frozenset(
    {"trust_remote_code", "code_revision", "custom_generate", "use_kernels", "adapter_kwargs", "quantization_config",
     "pickle_module", "allow_pickle"}
)  # fmt: skip

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(\.\*)?", re.ASCII)


@functools.cache
def listed() -> frozenset[str]:
    """The names that come with the program."""
    return frozenset(f"{module}.{name}" for module, names in _LISTED.items() for name in names.split())


def is_grant(text: str) -> bool:
    """Whether a text can stand in `trust`: `package.module.Name`, or `package.*` for all that a package defines."""
    return _NAME.fullmatch(text) is not None and "." in text


def allows(name: Any, granted: Collection[str]) -> bool:
    """Whether a name may be built, by the name alone. `granted` is what the user adds to the list."""
    if not isinstance(name, str) or not name.isascii():
        return False
    if name in listed() or name in granted:
        return True
    private = any(part.startswith("_") for part in name.split("."))
    return not private and any(name.startswith(grant[:-1]) for grant in granted if grant.endswith(".*"))


def advice(name: Any) -> str:
    """What to do about a name that may not be built."""
    own = "if you have read the file outside of here and trust it, copy it into ./recipes or ./conf"
    if not isinstance(name, str) or not is_grant(name):
        return own
    last = name.rpartition(".")[2]
    close = [full for full in listed() if full.rpartition(".")[2] == last and full.split(".")[0] == name.split(".")[0]]
    close = close or get_close_matches(name, listed(), 1, 0.9)
    return f"did you mean {close[0]}?" if close else f"{own}, or allow this name: trust=[{name}]"


def arguments(spec: Mapping[str, Any], key: str) -> list[Problem]:
    """What a recipe from elsewhere may not say to a name that it may build."""
    name = str(spec.get("_target_"))
    if not name.startswith("transformers."):
        return []
    problems = []
    for argument, value in spec.items():
        if argument not in build.WORDS | _HUB_ARGUMENTS | {"trust_remote_code"}:
            why = f"a recipe from elsewhere may say {', '.join(sorted(_HUB_ARGUMENTS))} to {name}"
            problems.append(Problem(f"{key}.{argument}", why, "give it on the command line", value=value))
    if len(spec.get("_args_") or ()) > 1:
        why = f"a recipe from elsewhere gives {name} its first argument by position, no more"
        problems.append(Problem(f"{key}._args_", why, "name the others"))
    if "trust_remote_code" not in spec:  # what it says has been looked at
        why = "without it the library may ask at the terminal whether to run the model's own code"
        problems.append(Problem(f"{key}.trust_remote_code", why, "write `trust_remote_code: false`"))
    return problems


def confirm(bound: Mapping[str, str], granted: Collection[str]) -> None:
    """Finds what bound targets are, importing only what their names allow, and refuses what is defined elsewhere.

    A name below an allowed package may lead out of it (`package.module.os.system`): what counts is where the object
    was defined. `bound` is key -> name. Raises InputError with all of them.
    """
    problems: list[Problem] = []
    for key, name in bound.items():
        if not allows(name, granted):
            problems.append(Problem(key, "a recipe from elsewhere may not build it", advice(name), value=name))
            continue
        if name in granted:
            continue  # the user's own word
        try:
            found = build.find(name, key)
        except InputError as error:
            problems += error.problems
            continue
        home = _home(found)
        if home is None or not _within(home, name, granted):
            what = "which is neither a class nor a function" if home is None else f"which {home} defines"
            why = f"leads to {getattr(found, '__qualname__', type(found).__name__)}, {what}"
            problems.append(Problem(key, why, f"if you trust it, allow this very name: trust=[{name}]", value=name))
    if problems:
        raise InputError(*problems)


def _home(found: Any) -> str | None:
    """The module in which a class, a function or a class's method was defined."""
    function = found.__func__ if inspect.ismethod(found) and inspect.isclass(found.__self__) else found
    if not (inspect.isclass(function) or inspect.isroutine(function)):
        return None
    home = function.__module__
    return home if isinstance(home, str) else None


def _within(home: str, name: str, granted: Collection[str]) -> bool:
    """Whether a module is one that the list, or a grant that covers the name, speaks of."""
    roots = [grant[:-2] for grant in granted if grant.endswith(".*") and name.startswith(grant[:-1])]
    if name in listed():
        roots.append(name.partition(".")[0])
    return any(home == root or home.startswith(f"{root}.") for root in roots)
