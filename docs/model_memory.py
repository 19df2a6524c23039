"""Write the memory table of docs/models.md, from the plan of train.py. make format runs this.

The setting: one row of 2,048 supervised tokens, bfloat16 on a GPU, gradient checkpointing, LoRA of
rank 8 on all linear layers.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minisft.model.config import ModelConfig  # noqa: E402
from minisft.model.parameters import count_parameters  # noqa: E402
from minisft.training.build import model_on_meta  # noqa: E402
from minisft.training.memory import phases  # noqa: E402
from minisft.training.options import parse_options  # noqa: E402
from minisft.training.plan import planned_step  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- memory: written by model_memory.py -->\n", "<!-- end of memory -->\n"
SETTING = [
    *("--model_name_or_path", "M", "--dataset", "rows.json", "--output_dir", "runs/a"),
    *("--per_device_train_batch_size", "1", "--cutoff_len", "2048", "--gradient_checkpointing"),
    *("--device", "cuda", "--dtype", "bfloat16"),
]
METHODS = {
    "LoRA": [],
    "QLoRA": ["--quantization_bit", "4"],
    "full": ["--finetuning_type", "full"],
}


def shape(
    family: str,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    tied: bool = False,
    **more: int,
) -> dict[str, Any]:
    """The fields of config.json that decide the number of parameters."""
    return {
        "model_type": family,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        **more,
    }


llama, mistral = partial(shape, "llama"), partial(shape, "mistral")
qwen2, qwen3, smollm3 = (partial(shape, family) for family in ("qwen2", "qwen3", "smollm3"))
baichuan = partial(shape, "baichuan")
MODELS = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "SmolLM2-360M": llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "Qwen2.5-0.5B": qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, 8, 151936, tied=True, head_dim=128),
    "TinyLlama-1.1B": llama(2048, 5632, 22, 32, 4, 32000),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "Qwen2.5-1.5B": qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "SmolLM2-1.7B": llama(2048, 8192, 24, 32, 32, 49152, tied=True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, 8, 151936, tied=True, head_dim=128),
    "SmolLM3-3B": smollm3(2048, 11008, 36, 16, 4, 128256, tied=True),
    "Qwen2.5-3B": qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Llama-3.2-3B": llama(3072, 8192, 28, 24, 8, 128256, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, 8, 151936, tied=True, head_dim=128),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Mistral-7B": mistral(4096, 14336, 32, 32, 8, 32000),
    "Baichuan2-7B": baichuan(4096, 11008, 32, 32, 32, 125696),
    "Qwen2.5-7B": qwen2(3584, 18944, 28, 28, 4, 152064),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "Llama-2-13B": llama(5120, 13824, 40, 40, 40, 32000),
    "Baichuan2-13B": baichuan(5120, 13696, 40, 40, 40, 125696),
    "Qwen2.5-14B": qwen2(5120, 13824, 48, 40, 8, 152064),
    "Qwen3-14B": qwen3(5120, 17408, 40, 40, 8, 151936, head_dim=128),
    "Llama-33B": llama(6656, 17920, 60, 52, 52, 32000),
    "Qwen2.5-32B": qwen2(5120, 27648, 64, 40, 8, 152064),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, 8, 151936, head_dim=128),
    "Llama-65B": llama(8192, 22016, 80, 64, 64, 32000),
    "Llama-2-70B": llama(8192, 28672, 80, 64, 8, 32000),
    "Llama-3.1-70B": llama(8192, 28672, 80, 64, 8, 128256),
    "Qwen2.5-72B": qwen2(8192, 29568, 80, 64, 8, 152064),
    "Llama-3.1-405B": llama(16384, 53248, 126, 128, 8, 128256),
}


def row(name: str) -> str:
    """The row of a model: its parameters, then the peak of a step in GB for each method."""
    cells = []
    for flags in METHODS.values():
        options = parse_options([*SETTING, *flags])
        model = model_on_meta(options, ModelConfig.from_dict(MODELS[name]), torch.bfloat16)
        step = planned_step(options, model, (2048, 2048), torch.bfloat16, "cuda", 1)
        cells.append(f"{max(phase.total for phase in phases(model, step)) / 1e9:,.1f}")
    # The last model was the one without adapters.
    return f"| {name} | {count_parameters(model) / 1e9:.2f} | {' | '.join(cells)} |\n"


def table() -> str:
    """The rows of all models."""
    head = f"| model | 10^9 parameters | {' | '.join(METHODS)} |\n|---|" + "---:|" * 4 + "\n"
    return head + "".join(map(row, MODELS))


def with_table(text: str) -> str:
    """The page with its memory table as the plan computes it now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
