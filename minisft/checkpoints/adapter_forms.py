"""Adapters as PEFT writes them, in the form that the other modules read.

    adapter = read_adapter("runs/cherry", is_tied=False)

    in the file                                 becomes
    X.lora_A.weight, X.lora_B.weight            the same: the factors of X
    X.weight, X.modules_to_save.weight          X.weight, which replaces the base's
    X.base_layer.weight                         X.weight: PEFT stores embeddings with the adapter if
    X.token_adapter.base_layer.weight               their size has changed
    X.original_module.weight                    nothing: the base's weight, which X.weight replaces
    X.lora_magnitude_vector (DoRA)              a change of X.weight
    X.lora_B.bias (lora_bias)                   a change of X.bias
    X.token_adapter.trainable_tokens_delta      a change of X.weight: some rows are replaced

A change is a function (rows, number of the first row) -> new rows, in float32. Models with changes
can answer and be exported, but cannot be trained further.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisft.checkpoints.tied_weights import EMBEDDING, OUTPUT, equal_tensors
from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, is_number, read_json
from minisft.common.lfs_pointers import refuse_pointer
from minisft.common.tensor_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, StoredTensor, read_header
from minisft.model.config import ModelConfig
from minisft.model.lora import LoraConfig
from minisft.model.modules_to_save import SAVEABLE_MODULES, short_names
from minisft.text.tokenizer_files import has_tokenizer

PEFT_PREFIX = "base_model.model."
# Options of PEFT that change the computation of an adapter, and that we do not support.
UNSUPPORTED = (
    "fan_in_fan_out use_qalora alora_invocation_tokens use_bdlora layer_replication arrow_config "
    "target_parameters kasa_config monteclora_config velora_config"
).split()
# Initialisations that do not change the base model. Others change it in ways that we do not know.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
MERGE_WITH_PEFT = (
    "Merge it with PEFT (merge_and_unload, save_pretrained) and use the merged folder."
)
LORA_HEAD = "lm_head.lora_A.weight"
MAGNITUDE, TOKENS, LORA_BIAS = ".lora_magnitude_vector", ".trainable_tokens_delta", ".lora_B.bias"

MAX_PATTERNS = 10_000  # of alpha_pattern; every module is matched with each
# Regular expressions that a hostile file could use to keep us busy: a repeated group, or more than
# three repetitions.
ENDLESS = re.compile(r"\)[*+{]|(?:[*+{].*){4}", re.DOTALL)

Change = Callable[[Tensor, int], Tensor]


@dataclass
class Adapter:
    """The content of an adapter's files.

    tensors: {name in the model: StoredTensor}, factors and weights that replace the base's.
    changes: {name of a weight or bias: its Change}. alphas: {pattern of module names: alpha}.
    untrainable: the options of PEFT that cannot be trained further. last_token: the highest id in
    trainable_token_indices.
    """

    path: Path
    config: LoraConfig
    tensors: dict[str, StoredTensor]
    changes: dict[str, Change]
    alphas: dict[re.Pattern[str], float]
    untrainable: list[str]
    last_token: int = -1

    def module_config(self, module_name: str, rank: int) -> LoraConfig:
        """The LoraConfig of one module. The first matching pattern decides, as in PEFT."""
        alpha = self.config.alpha
        for pattern, value in self.alphas.items():
            if pattern.match(module_name):
                alpha = value
                break
        return replace(self.config, rank=rank, alpha=alpha)

    def replaced_modules(self) -> list[str]:
        """The modules whose weights the file holds in full."""
        return [
            name.removesuffix(".weight")
            for name in self.tensors
            if name.endswith(".weight") and ".lora_" not in name
        ]


def read_adapter(adapter_dir: str | Path, is_tied: bool) -> Adapter:
    """Read the files of an adapter. UserError if it has something that is not supported.

    is_tied: True if the base model's output matrix is its embedding.
    """
    adapter_dir = Path(adapter_dir)
    path = adapter_dir / ADAPTER_CONFIG
    content = read_json(path)
    config = _read_config(path, content)
    tensors = adapter_tensors(adapter_dir)
    alphas = _read_alphas(path, content.get("alpha_pattern") or {})
    untrainable = [
        name for name in ("use_dora", "lora_bias", "trainable_token_indices") if content.get(name)
    ]
    if content.get("ensure_weight_tying") and config.modules_to_save:
        untrainable.append("ensure_weight_tying")
    adapter = Adapter(adapter_dir / ADAPTER_WEIGHTS, config, tensors, {}, alphas, untrainable)
    if is_tied:
        _settle_tie(tensors, config)
    _add_lora_changes(adapter, bool(content.get("use_dora")))
    _add_token_changes(adapter, content.get("trainable_token_indices"), is_tied)
    return adapter


def refuse_untrainable(adapter: Adapter, use: str) -> None:
    """UserError if an adapter can only be loaded and merged. use: the refused use, for messages."""
    if adapter.untrainable:
        raise UserError(
            f"{adapter.path.parent}: an adapter with {', '.join(adapter.untrainable)} cannot be "
            f"{use}. Merge it into its base (export.py --format hf) and continue from the "
            "merged folder."
        )


def vocabulary_size(config: ModelConfig, adapter_dir: str | Path | None) -> int:
    """The number of tokens of a model with an adapter, which may have resized its embedding."""
    tensors = adapter_tensors(adapter_dir) if adapter_dir else {}
    resized = tensors.get(EMBEDDING) or tensors.get(OUTPUT)
    return resized.shape[0] if resized and resized.shape else config.vocab_size


def tokenizer_dir(model_dir: str | Path, adapter_dir: str | Path | None) -> Path:
    """The folder of the tokenizer: the adapter's if it has one and may have new tokens.

    An adapter with new tokens holds rows of the embedding, not necessarily more than the base has.
    """
    if adapter_dir:
        rows = {EMBEDDING, OUTPUT, EMBEDDING.removesuffix(".weight") + TOKENS}
        if has_tokenizer(adapter_dir) and not rows.isdisjoint(adapter_tensors(adapter_dir)):
            return Path(adapter_dir)
    return Path(model_dir)


def adapter_tensors(adapter_dir: str | Path) -> dict[str, StoredTensor]:
    """{name in the model: StoredTensor} of the adapter in a PEFT folder."""
    path = Path(adapter_dir) / ADAPTER_WEIGHTS
    if not path.is_file():
        if (pickled := path.with_suffix(".bin")).is_file():
            refuse_pointer(pickled)
            raise UserError(
                f"{pickled}: pickled files are never opened. Save the adapter as safetensors with "
                "PEFT (from_pretrained, save_pretrained)."
            )
        raise UserError(
            f"{adapter_dir}: there is no {ADAPTER_WEIGHTS}. Give the folder of a complete adapter."
        )
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in read_header(path).items():
        name = key.removeprefix(PEFT_PREFIX)
        if name == key:
            raise UserError(
                f"{path}: tensor {key} does not begin with {PEFT_PREFIX}. Save it with PEFT."
            )
        if ".original_module." in name:  # the weight that modules_to_save replaces
            continue
        if ".lora_embedding_" in name:
            raise UserError(f"{path}: LoRA on embed_tokens is not supported. {MERGE_WITH_PEFT}")
        name = name.replace(".default.", ".")
        for part in (".modules_to_save.", ".token_adapter.base_layer.", ".base_layer."):
            name = name.replace(part, ".")
        name = name.replace(".token_adapter.", ".")
        name = name.replace(f"{MAGNITUDE}.weight", MAGNITUDE)
        # Newer versions of PEFT store the same trained weight under two names.
        if name in tensors and not equal_tensors(tensors[name], tensor):
            raise UserError(
                f"{path}: {tensors[name].name} and {key} are the same tensor. "
                "Save it again with PEFT."
            )
        tensors[name] = tensor
    return tensors


def _settle_tie(tensors: dict[str, StoredTensor], config: LoraConfig) -> None:
    """Keep an output matrix in `tensors` only if it must be separate. In place."""
    if {"embed_tokens", "lm_head"} & set(config.modules_to_save):
        return  # both are trained separately
    if OUTPUT in tensors:
        tensors.setdefault(EMBEDDING, tensors[OUTPUT])
    if EMBEDDING not in tensors:
        return
    if LORA_HEAD in tensors:
        tensors.setdefault(OUTPUT, tensors[EMBEDDING])
    elif OUTPUT in tensors and equal_tensors(tensors[EMBEDDING], tensors[OUTPUT]):
        del tensors[OUTPUT]


def _add_lora_changes(adapter: Adapter, use_dora: bool) -> None:
    """Move DoRA's and lora_bias's tensors to the changes."""
    tensors = adapter.tensors
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    for module in modules:
        A, B = (tensors.get(f"{module}.lora_{factor}.weight") for factor in "AB")
        if A is None or B is None or len(A.shape) != 2 or len(B.shape) != 2:
            continue  # load_adapter reports the error
        scaling = adapter.module_config(module, A.shape[0]).scaling if A.shape[0] else 0.0
        if bias := tensors.pop(module + LORA_BIAS, None):
            bias.check(B.shape[:1], "lora_B has rows")
            adapter.changes[f"{module}.bias"] = partial(_add_bias, bias, scaling)
        magnitude = tensors.pop(module + MAGNITUDE, None)
        if magnitude is None:
            if use_dora:
                raise UserError(f"{adapter.path}: use_dora, but {module + MAGNITUDE} is missing")
            continue
        if A.shape[0] != B.shape[1]:
            raise UserError(f"{adapter.path}: {module}: lora_A and lora_B differ in rank")
        magnitude.check(B.shape[:1], "lora_B has rows")
        adapter.changes[f"{module}.weight"] = partial(_decompose, A, B, scaling, magnitude)
        del tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]


def _decompose(
    A: StoredTensor,
    B: StoredTensor,
    scaling: float,
    magnitude: StoredTensor,
    rows: Tensor,
    begin: int,
) -> Tensor:
    """DoRA (arXiv 2402.09353): m (W + s B A) / |W + s B A|, with a norm for each row."""
    end = begin + len(rows)
    update = B.read(begin, end).float() @ A.read().float()
    rows = rows + scaling * update.to(rows.device)
    norms = magnitude.read(begin, end).float().to(rows.device)
    return rows * (norms / rows.norm(dim=1))[:, None]


def _add_bias(bias: StoredTensor, scaling: float, rows: Tensor, begin: int) -> Tensor:
    """b + s b_B: lora_B has a bias, too."""
    return rows + scaling * bias.read(begin, begin + len(rows)).float().to(rows.device)


def _add_token_changes(adapter: Adapter, indices: Any, is_tied: bool) -> None:
    """Move the rows of trainable_token_indices to the changes."""
    tensors = adapter.tensors
    for weight in (EMBEDDING, OUTPUT):
        module = weight.removesuffix(".weight")
        delta = tensors.get(module + TOKENS)
        if delta is None:
            continue
        chosen = indices
        if isinstance(indices, dict):
            short = module.rpartition(".")[2]
            chosen = indices.get(short) or indices.get(module) or indices.get("embed_tokens")
        limit = delta.shape[0] if delta.shape else 0
        if not isinstance(chosen, list) or not all(is_integer(index, 0) for index in chosen):
            raise UserError(f"{adapter.path}: trainable_token_indices must be a list of token ids")
        if len(chosen) != limit:
            raise UserError(
                f"{adapter.path}: {delta.name} has {limit} rows for the {len(chosen)} tokens of "
                "trainable_token_indices"
            )
        adapter.changes[weight] = partial(_replace_rows, torch.tensor(chosen), delta)
        adapter.last_token = max([adapter.last_token, *chosen])
    first, second = (
        tensors.pop(EMBEDDING.removesuffix(".weight") + TOKENS, None),
        tensors.pop(OUTPUT.removesuffix(".weight") + TOKENS, None),
    )
    if not is_tied or EMBEDDING not in adapter.changes:
        return
    if LORA_HEAD in tensors:  # the output matrix is a copy of the embedding, rows included
        adapter.changes.setdefault(OUTPUT, adapter.changes[EMBEDDING])
    elif OUTPUT not in tensors and first and second and equal_tensors(first, second):
        del adapter.changes[OUTPUT]  # PEFT stores the rows of a tied matrix twice


def _replace_rows(indices: Tensor, new: StoredTensor, rows: Tensor, begin: int) -> Tensor:
    """The rows with the tokens of `indices` replaced by those of `new`."""
    is_here = (indices >= begin) & (indices < begin + len(rows))
    rows = rows.clone()
    rows[indices[is_here] - begin] = new.read().float()[is_here].to(rows.device)
    return rows


def _read_alphas(path: Path, alphas: Any) -> dict[re.Pattern[str], float]:
    is_valid = isinstance(alphas, dict) and len(alphas) <= MAX_PATTERNS
    if not is_valid or not all(is_number(value, above=-1e12) for value in alphas.values()):
        raise UserError(
            f"{path}: alpha_pattern must map up to {MAX_PATTERNS:,} names of modules to numbers"
        )
    compiled = {}
    for pattern, alpha in alphas.items():
        try:
            if ENDLESS.search(pattern):
                raise re.error("so many repetitions may never end; name the modules")
            compiled[re.compile(rf"(.*\.)?({pattern})$")] = alpha
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{path}: alpha_pattern {pattern!r}: {error}") from error
    return compiled


def _read_config(path: Path, content: dict[str, Any]) -> LoraConfig:
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: not a LoRA adapter (peft_type is not LORA)")
    for name in UNSUPPORTED:
        if content.get(name):
            raise UserError(f"{path}: {name} is not supported. {MERGE_WITH_PEFT}")
    initialisation = content.get("init_lora_weights")
    if initialisation not in PLAIN_INITIALISATIONS:
        raise UserError(
            f"{path}: init_lora_weights '{initialisation}' has changed the base model. Save the "
            "adapter as plain LoRA (see PEFT's documentation)."
        )
    if content.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias '{content['bias']}' is not supported (only none). {MERGE_WITH_PEFT}"
        )
    # For a classification model, PEFT lists both "classifier" and "score", whichever exists.
    names = _names(path, content, "modules_to_save")
    saved = short_names([name for name in names if name != "classifier"])
    if not all(name in SAVEABLE_MODULES or name.endswith("norm") for name in saved):
        raise UserError(
            f"{path}: modules_to_save {list(saved)}; only {', '.join(SAVEABLE_MODULES)} and norms "
            f"are supported. {MERGE_WITH_PEFT}"
        )
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not is_integer(rank, 1, 2**20) or not is_number(alpha, above=-1e12):
        raise UserError(f"{path}: needs the numbers r and lora_alpha, not {rank!r} and {alpha!r}")
    return LoraConfig(
        rank=rank,
        alpha=float(alpha),
        target_modules=_names(path, content, "target_modules"),
        use_rslora=bool(content.get("use_rslora")),
        modules_to_save=saved,
    )


def _names(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    """The names under a key of adapter_config.json: a list, or a single name."""
    value = content.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {key} must be a list of names, not {value!r}")
    return tuple(value)
