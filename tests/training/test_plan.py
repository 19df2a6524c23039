"""memory.py and plan.py: the plan matches autograd, torch's allocator and train.py's run."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, ROOT, as_flags, command
from run_builder import training_options
from torch.utils.flop_counter import FlopCounterMode

import train
from bench import peak
from bench.training_run import CHECKPOINTING, FULL, Setting, prepare
from minisft.checkpoints.folders import load_model, save_model
from minisft.common.errors import UserError
from minisft.common.metric_lines import read_metrics
from minisft.data import batching, build_batches
from minisft.model import loss
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.parameters import count_parameters
from minisft.text.tokenizer import Tokenizer
from minisft.training import lengths, memory, plan, speed
from minisft.training.adapter_options import complete_options
from minisft.training.build import model_on_meta
from minisft.training.objective import NextToken
from minisft.training.operations import layer_operations, training_operations
from minisft.training.options import parse_options

RECIPES = sorted((ROOT / "examples/recipes").glob("*.toml"))
SHAPE = {
    **CONFIG,
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 264,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 4,
}


def saved(folder, fields, seed=0):
    """A checkpoint with random weights in bfloat16 -> its ModelConfig."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig.from_dict(fields))
    model.initialize()
    save_model(model, folder, torch.bfloat16)
    return ModelConfig.load(folder)


QWEN3 = {"model_type": "qwen3", "head_dim": 16}
BAICHUAN = {"model_type": "baichuan", "num_key_value_heads": 6, "max_position_embeddings": 64}
ALIBI = BAICHUAN | {"max_position_embeddings": None}


@pytest.mark.parametrize(
    ("fields", "lora", "bits", "dtype"),
    [
        ({}, LoraConfig(rank=5), None, torch.float32),
        ({}, None, None, torch.float32),
        ({}, LoraConfig(rank=5), None, torch.bfloat16),
        ({}, None, None, torch.bfloat16),
        ({}, LoraConfig(rank=5), 4, torch.float32),
        ({}, LoraConfig(rank=5), 8, torch.bfloat16),
        ({}, LoraConfig(target_modules=("q_proj", "v_proj")), None, torch.float32),
        ({}, LoraConfig(target_modules=("o_proj", "down_proj")), None, torch.float32),
        ({}, LoraConfig(dropout=0.1), None, torch.float32),
        ({}, LoraConfig(dropout=0.1), None, torch.bfloat16),
        ({}, LoraConfig(rank=5, modules_to_save=("embed_tokens",)), None, torch.bfloat16),
        (QWEN3, LoraConfig(), None, torch.float32),
        (QWEN3, None, None, torch.bfloat16),
        (BAICHUAN, LoraConfig(rank=5), None, torch.float32),
        (BAICHUAN, None, None, torch.bfloat16),
        (ALIBI, LoraConfig(rank=5), 4, torch.float32),
        (ALIBI, LoraConfig(dropout=0.1), None, torch.bfloat16),
        (ALIBI, None, None, torch.float32),
    ],
)
def test_planned_activations_of_a_layer_are_what_autograd_keeps(
    fields, lora, bits, dtype, tmp_path
):
    """Within a hundredth; the plan omits a few numbers: the sums of the attention and of the norms.

    The peak of a step would hide an error here behind weights and logits.
    """
    saved(tmp_path, SHAPE | fields)
    model = load_model(tmp_path, dtype if lora else torch.float32, quantization_bit=bits)
    if lora:
        add_lora(model, lora)
    else:
        model.requires_grad_(True)
    model.train()
    kept, known = (
        {},
        {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())},
    )
    layer = model.model.layers[1]

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.ndim > 1:  # not a norm's weight in another type
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    def begin(_, arguments):
        _, factors, *_ = arguments  # all layers share them
        known.update(one.untyped_storage().data_ptr() for one in factors)
        hooks.__enter__()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(torch.randint(0, 500, (3, 16)))
    step = memory.Step(48, 48, dtype)
    planned = 48 * memory.layer_bytes_per_token(model, step) + memory.cast_bytes(layer, step)
    measured = sum(size for place, (size, _) in kept.items() if place not in known)
    assert planned == pytest.approx(measured, rel=0.01)


WIDE = SHAPE | {"hidden_size": 384, "intermediate_size": 1024}
LARGE_VOCABULARY = SHAPE | {"vocab_size": 20000}
TIED = LARGE_VOCABULARY | {"tie_word_embeddings": True}
DPO, REWARD = peak.DPO, peak.REWARD
EIGHT_BITS, PURE = peak.EIGHT_BITS, peak.PURE_BF16


@pytest.mark.parametrize(
    "setting",
    [
        Setting(SHAPE, 4, 128),
        Setting(LARGE_VOCABULARY, 4, 400),
        Setting(SHAPE, 4, 128, flags=CHECKPOINTING),
        Setting(SHAPE, 4, 128, flags=FULL),
        Setting(WIDE, 1, 32, flags=FULL),
        Setting(TIED, 1, 64, 3, flags=FULL),
        Setting(TIED, 1, 64, flags=FULL),
        Setting(SHAPE | {"vocab_size": 8000}, 4, 400, 2, flags=FULL + CHECKPOINTING),
        Setting(SHAPE, 4, 128, dtype="bfloat16", flags=FULL),
        Setting(WIDE, 1, 32, 2, "bfloat16", FULL + CHECKPOINTING),
        Setting(
            SHAPE | {"hidden_size": 384}, 2, 64, flags=("--quantization_bit", "4", "--packing")
        ),
        Setting(LARGE_VOCABULARY, 1, 64, flags=("--modules_to_save", "embed_tokens,lm_head")),
        Setting(TIED, 1, 64, flags=REWARD + FULL),
        Setting(LARGE_VOCABULARY, 2, 128, flags=REWARD),
        Setting(LARGE_VOCABULARY, 1, 64, flags=(*DPO, "--modules_to_save", "lm_head")),
        Setting(WIDE, 1, 32, flags=DPO + FULL),
        Setting(WIDE, 1, 32, 1, "bfloat16", (*DPO, *FULL, "--precompute_reference")),
        Setting(WIDE, 1, 32, flags=FULL + EIGHT_BITS),
        Setting(WIDE, 1, 32, 2, "bfloat16", FULL + EIGHT_BITS + PURE),
        Setting(WIDE, 1, 32, 1, "bfloat16", (*DPO, *FULL, *PURE)),
        Setting(TIED, 4, 128, 1, "bfloat16", FULL + EIGHT_BITS + PURE + CHECKPOINTING),
        Setting(SHAPE | ALIBI, 4, 128),
        Setting(LARGE_VOCABULARY | ALIBI, 1, 64, flags=("--modules_to_save", "lm_head")),
        Setting(LARGE_VOCABULARY | BAICHUAN, 2, 400, flags=FULL),
    ],
)
def test_planned_peak_is_the_measured_one(setting, tmp_path, monkeypatch):
    """The plan is within a tenth of the peak of torch's allocator in a step of train.py."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 2**23)  # several chunks in some of these
    saved(tmp_path / "model", setting.config)
    found = peak.measure(tmp_path, setting)
    assert found["planned"] == pytest.approx(found["tensors"], rel=0.1), found["at"]


def test_checkpointed_layers_leave_no_copies_of_their_weights():
    """In half precision, autocast would otherwise keep the copies of all layers until the loss."""
    model = CausalLM(ModelConfig.from_dict(SHAPE)).train()
    model.model.gradient_checkpointing = True
    with torch.autocast("cpu", torch.bfloat16):
        held = peak.most_allocated(lambda: model(torch.zeros(1, 2, dtype=torch.int64)))
    of_layer = memory.cast_bytes(model.model.layers[0], memory.Step(2, 2, torch.bfloat16))
    assert of_layer > 100_000 and held < 1.5 * of_layer


def test_parameters_are_those_of_transformers_and_peft(shared_data):
    import peft
    import transformers

    folder = shared_data / "configs/Meta-Llama-3-8B-Instruct"
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder)
        )
        total = theirs.num_parameters()
        theirs = peft.get_peft_model(
            theirs, peft.LoraConfig(r=64, target_modules="all-linear", modules_to_save=["lm_head"])
        )
    for bits in (None, 4):
        words = ["--quantization_bit", str(bits)] if bits else []
        options = training_options(*words, lora_rank="64", modules_to_save="lm_head")
        model = model_on_meta(options, ModelConfig.load(folder), torch.bfloat16)
        trained = memory.num_trainable(model)
        assert trained == theirs.get_nb_trainable_parameters()[0]
        factors = trained - model.lm_head.weight.numel()
        assert count_parameters(model) == total + factors
        expected = 4 * trained + 2 * (total + factors - trained)
        if bits:  # all but norms and embedding: 4 bits, and 8 for the scale of every 64 numbers
            small = sum(one.numel() for one in model.parameters() if one.dtype == torch.bfloat16)
            expected = 4 * trained + 2 * small + (total + factors - trained - small) * 4.127 / 8
            expected += 32 * 7 * (2 * 256 + 256) * 4  # each of the matrices has its two tables
        assert memory.stored_bytes(model) == pytest.approx(expected, rel=1e-5)


HEAD = (
    "--modules_to_save",
    "lm_head",
)  # torch cannot count the products with a frozen output matrix


@pytest.mark.parametrize("flags", [HEAD, HEAD + CHECKPOINTING, FULL])
def test_operations_are_those_that_torch_counts(flags, tmp_path):
    saved(tmp_path / "model", SHAPE)
    run, batches = prepare(tmp_path, Setting(SHAPE, 4, 16, flags=flags))
    batches = [(tokens, torch.ones_like(supervised), None) for tokens, supervised, _ in batches]
    with FlopCounterMode(display=False) as counter:
        train.train_step(run, batches)
    planned = training_operations(run.model, 16, "--gradient_checkpointing" in flags)
    # Not counted by torch here: attention, 2 per cent of it.
    assert 0.93 < counter.get_total_flops() / (64 * planned) < 1.0


@pytest.mark.parametrize("flags", [(), FULL, CHECKPOINTING, ("--quantization_bit", "4")])
def test_the_speed_is_that_of_training_one_layer(flags, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    options = parse_options(["--model_name_or_path", "m", "--dry_run", "--dataset", "d", *flags])
    options.learning_rate = 1e-4
    small, large = (
        model_on_meta(
            options,
            ModelConfig.from_dict({**SHAPE, "num_hidden_layers": num_layers}),
            torch.float32,
        )
        for num_layers in (2, 5)
    )
    checkpointing = flags == CHECKPOINTING
    three = training_operations(large, 9, checkpointing) - training_operations(
        small, 9, checkpointing
    )
    assert three == pytest.approx(3 * layer_operations(small, 9, checkpointing))
    found = speed.measure_speed(small, options, torch.float32, num_rows=3, length=9)
    assert 0 < found.operations < 1e15 and 0 < found.seconds_to_update < 1
    assert all(parameter.is_meta for parameter in small.parameters())


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_blocks_of_plain_text_are_shown(packing, checkpoint, tmp_path, here):
    texts = [f"the cat sat on mat {number}" for number in range(40)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts))
    words = ["--packing"] if packing else []
    words += as_flags(model_name_or_path=checkpoint, stage="pt", dataset=path, block_size=32)
    said = here(train, *words, "--dry_run", "--show_samples", 2, "--show_ids")
    tokenizer = Tokenizer.load(checkpoint)
    stream = [id for text in texts for id in [0, *tokenizer.encode(text), 1]]
    shown = [list(map(int, ids.split())) for ids in re.findall("^ids: (.*)$", said, re.MULTILINE)]
    assert sum(shown, []) == stream[:64]
    if not packing:
        assert list(map(len, shown)) == [32, 32]
        assert "[[<s>the cat sat on mat 0</s><s>the cat" in said
    assert "(sample 2: " in said and "an epoch" in said
    assert "supervised, between [[ and ]])" in said and "\033" not in said


def test_rows_of_the_wrong_kind_end_the_plan(checkpoint, tmp_path, here):
    """Only rows that are not there are assumed."""
    entry = {"pairs": {"file_name": "pairs.json", "ranking": True}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry))
    words = ["--model_name_or_path", checkpoint, "--template", "plain", "--dataset_dir", tmp_path]
    with pytest.raises(UserError, match="pairs: preference data"):
        here(train, *words, "--dataset", "pairs", "--dry_run")
    said = here(train, *words, "--dataset", "pairs", "--dry_run", "--stage", "dpo")
    assert "the rows are not available" in said


def test_rows_that_are_not_there_cannot_be_shown(checkpoint, tmp_path):
    words = as_flags(model_name_or_path=checkpoint, dataset=tmp_path / "no.json", template="plain")
    done = command(*words, dry_run=True, show_samples=2)
    assert done.returncode == 2 and "no.json: there is no such file" in done.stderr


def test_a_dry_run_asks_no_hub_for_an_adapter(monkeypatch):
    asked = []

    def download(name, patterns, offline=False):
        asked.append((name, offline))
        raise UserError("download failed")

    monkeypatch.setattr("minisft.checkpoints.hub.download", download)
    for model in ([], ["--model_name_or_path", "base"]):
        words = ["--adapter", "owner/adapter", "--dataset", "rows.json", *model, "--dry_run"]
        with pytest.raises(UserError, match="owner/adapter: no such folder, and the download"):
            complete_options(parse_options(words))
    assert asked == [("owner/adapter", True)] * 2
    with pytest.raises(UserError, match="owner/nowhere: no such folder, and --dry_run downloads"):
        plan.local_folder("owner/nowhere")


def numbers(pattern, text):
    return [float(one.replace(",", "")) for one in re.search(pattern, text).groups()]


@pytest.mark.parametrize("stage", ["sft", "pt", "rm", "dpo"])
def test_the_plan_is_what_the_run_does(stage, checkpoint, tmp_path, monkeypatch, capsys, here):
    rows = [
        {"instruction": "Say" + " it" * (number % 40), "output": "the cat " * (number % 7 + 1)}
        for number in range(61)
    ]
    path = tmp_path / "rows.json"
    if stage == "pt":
        rows = [{"text": row["output"] * 9} for row in rows]
    for number, row in enumerate(rows if stage in ("rm", "dpo") else ()):
        row["output"] = [row["output"], "no " * (number % 5 + 1), "well"][: 2 + (number % 4 == 0)]
    path.write_text(json.dumps(rows))
    words = as_flags(
        model_name_or_path=checkpoint,
        dataset=path,
        output_dir=tmp_path / "o",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        device="cpu",
        dtype="float32",
        num_train_epochs=1,
        stage=stage,
        dataloader_num_workers=0,
    )
    words += ["--block_size", 32] if stage == "pt" else ["--template", "plain"]
    words += ["--finetuning_type", "full"] if stage == "dpo" else []
    said = here(train, "--dry_run", *words)
    assert not (tmp_path / "o").exists()
    collate, sizes = batching.collate, []

    def collated(*arguments):
        batch = collate(*arguments)
        sizes.append(batch[0].numel())
        return batch

    monkeypatch.setattr(batching, "collate", collated)  # as --stage rm and dpo have it
    monkeypatch.setattr(NextToken, "collate", staticmethod(collated))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.main()
    last = read_metrics(tmp_path / "o/metrics.jsonl")[-1]
    (steps,) = numbers(r"epoch, ([\d,]+) in all", said)
    tokens, padding = numbers(r"([\d,]+) tokens, ([\d.]+)% padding", said)
    assert steps == last["step"]
    assert numbers(r"with ([\d,]+) tokens in the largest", said) == [max(sizes)]
    assert ("61 rows, 138 answers" in said) == (stage in ("rm", "dpo"))
    if stage != "pt":
        assert tokens == last["tokens"]
        assert padding == pytest.approx(100 * (1 - tokens / sum(sizes)), abs=0.06)
    else:  # blocks are counted as if all were full
        assert tokens == pytest.approx(last["tokens"], 0.1) and padding == 0
    trained, total = numbers(r"training ([\d,]+) of ([\d,]+) parameters", capsys.readouterr().out)
    assert numbers(r"([\d,]+) parameters, of which ([\d,]+) are", said) == [total, trained]
    copied = re.search(r"reference   a copy of ([\d,]+)", said)
    assert (stage == "dpo") == bool(copied and float(copied[1].replace(",", "")) == total)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_of_many_rows_a_part_is_encoded(stage, checkpoint, tmp_path, monkeypatch, here):
    """Tokens, padding, largest micro-batch and lengths are then about those of all rows."""
    rows = [
        {"instruction": "Say" + " it" * (number * 7 % 50), "output": "the cat " * (number % 9)}
        for number in range(900)
    ]
    if stage == "dpo":
        rows = [
            row | {"output": [row["output"], "no " * (number % 5 + 1)]}
            for number, row in enumerate(rows)
            if row["output"]
        ]
        rows += [{"output": ["lonely"]}] * 100
    else:  # in every tenth row the prompt is too long, so no answer is left
        rows = [
            one
            for number, row in enumerate(rows)
            for one in (row, {"instruction": " it" * 300, "output": "no"})[: 1 + (number % 9 == 4)]
        ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = as_flags(
        model_name_or_path=checkpoint,
        dataset=tmp_path / "rows.json",
        template="plain",
        skip_bad_rows=True,
        output_dir="o",
        device="cpu",
        cutoff_len=200,
        stage=stage,
    )
    patterns = (
        r"an epoch    ([\d,]+) (?:row|block)s",
        r"([\d,]+) tokens, ([\d.]+)% padding",
        r"with ([\d,]+) tokens in the largest",
        r"tokens; median ([\d,]+), 95 % have at most ([\d,]+)",
    )
    every = here(train, "--dry_run", *words)
    monkeypatch.setattr(build_batches, "MAX_COUNTED", 250)
    monkeypatch.setattr(lengths, "MAX_ENCODED", 90)
    monkeypatch.setattr(lengths, "MAX_BATCHED", 450)
    part = here(train, "--dry_run", *words)
    count = {"sft": 900, "dpo": 800}[stage]
    assert f"; 90 of {count} rows, the others estimated from these" in part
    assert "estimated" not in every
    if stage == "sft":
        assert "\n800 of 900 rows have something to learn; epochs, steps" in every
        assert re.search(r"\nabout \d\d\d of 900 rows have something to learn; epochs", part)
    for pattern, tolerance in zip(patterns, (0.05, 0.1, 0.2, 0.1), strict=True):
        assert numbers(pattern, part) == pytest.approx(
            numbers(pattern, every), rel=tolerance, abs=3
        )


LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def test_seventy_billion_on_64_gpus_from_config_json(tmp_path, here):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "x" * 400, "output": "四个字节" * 100}] * 640))
    words = as_flags(
        model_name_or_path=tmp_path,
        output_dir=tmp_path / "o",
        device="cuda",
        num_processes=64,
        finetuning_type="full",
        gradient_checkpointing=True,
        device_memory="80GB",
        per_device_train_batch_size=1,
        parallel="fsdp",
    )
    said = here(train, "--dry_run", *words, "--dataset", rows, "--device_tflops", 400)
    assert "70,553,706,496 parameters, of which 70,553,706,496 are trained in full" in said
    assert "estimated, 4 bytes per token" in said and "640 rows, 256,000 tokens" in said
    assert "10 an epoch, 30 in all" in said
    # An eighth of 64 ranks' worth: 4 bytes of weight, 8 of averages, each over 64.
    assert numbers(r"optimizer +([\d.]+)", said) == [pytest.approx(70.55 * 8 / 64, abs=0.01)]
    assert numbers(r"gradients +([\d.]+)", said)[0] > 70.55 * 4 / 64
    assert "fits        yes" in said
    # 6 operations a weight and token, 2 more for checkpointing.
    (work,) = numbers(r"tokens, ([\d.e+]+) operations", said)
    assert work == pytest.approx(3 * 256_000 * 8 * 70e9, rel=0.05)
    (seconds,) = numbers(r"time +([\d.]+) seconds", said)
    assert seconds == pytest.approx(work / 64 / 400e12, abs=1)

    said = here(train, "--dry_run", *words[:-2], "--dataset", "nowhere.json", "--max_steps", 5)
    assert "assumed, 1,024 tokens in every row" in said and "fits        NO" in said
    said = here(train, "--dry_run", *words, "--dataset", rows)
    (weights,) = numbers(r"weights +([\d.]+)", said)

    # A separate reference takes four more bytes, over 64, and computes all answers as well.
    rows.write_text(
        json.dumps([{"instruction": "x" * 400, "output": ["四个字节" * 100, "y", "z"]}] * 640)
    )
    said = here(train, "--dry_run", *words, "--dataset", rows, "--stage", "dpo")
    assert "reference   a copy of 70,553,706,496" in said
    assert numbers(r"weights +([\d.]+)", said) == [
        pytest.approx(weights + 4 * 70.55 / 64, abs=0.01)
    ]
    assert "640 rows, 1,920 answers, 385,280 tokens" in said
    (work,) = numbers(r"tokens, ([\d.e+]+) operations", said)
    assert work == pytest.approx(3 * 640 * 3 * 400 * 10 * 70e9, rel=0.05)  # padding too
    said = here(
        train, "--dry_run", *words, "--dataset", rows, "--stage", "dpo", "--precompute_reference"
    )
    assert "reference" not in said
    assert numbers(r"weights +([\d.]+)", said) == [weights]
    # A reward model ends in a row of numbers.
    said = here(train, "--dry_run", *words, "--dataset", "nowhere.json", "--stage", "rm")
    assert "in every answer of two" in said and numbers(r"logits +([\d.]+)", said) == [0]
    assert f"{70_553_706_496 - 128_255 * 8192:,} parameters" in said
    assert not (tmp_path / "o").exists()


def test_the_reference_has_a_copy_of_an_adapter_that_is_trained_on():
    """The reference does not copy a new adapter, which changes nothing yet."""
    model = CausalLM(ModelConfig.from_dict(SHAPE))
    add_lora(model, LoraConfig(rank=5))
    words = ["--model_name_or_path", "-", "--dataset", "-", "--output_dir", "-", "--stage", "dpo"]
    assert plan.num_copied(parse_options(words), model) == 0
    copied = plan.num_copied(parse_options([*words, "--adapter", "a"]), model)
    assert copied == memory.num_trainable(model)


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_plan_and_run_report_the_same_rows(stage, checkpoint, tmp_path, monkeypatch, capsys, here):
    """Both count truncated, dropped and broken rows, for training and for evaluation."""
    rows = [
        {"instruction": "Hi", "output": answer}
        for answer in ("yes", "yes " * 60, "well " * 60, "no", "the cat", "the mat", "so", "", "oh")
    ]
    for row in rows if stage != "sft" else ():
        row["output"] = [row["output"], "no"]  # one pair of equal ones
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"named": {"file_name": "rows.json", "ranking": stage != "sft"}})
    )
    words = as_flags(
        model_name_or_path=checkpoint,
        dataset="named",
        dataset_dir=tmp_path,
        stage=stage,
        template="plain",
        output_dir=tmp_path / "o",
        cutoff_len=40,
        validation_split=4,
        skip_bad_rows=True,
        device="cpu",
        max_steps=1,
        seed=1,
        dataloader_num_workers=0,
    )
    planned = here(train, "--dry_run", *words).splitlines()
    assert any(line.startswith("lengths     counted by the tokenizer: ") for line in planned)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.main()
    said = [
        line
        for line in capsys.readouterr().out.splitlines()
        if re.match(
            r"a sample of 4 rows( at --cutoff_len 40)?: \d of 4 rows|evaluation: \d of 4 rows|"
            r"1 broken row left out|\d of 4 rows have something to learn",
            line,
        )
    ]
    assert len(said) == (3 if stage == "sft" else 4) and planned[: len(said)] == said
    assert ("their answers are the same" in " ".join(said)) == (stage != "sft")


def test_a_planned_device_need_not_be_present_but_must_be_valid(checkpoint, rows_file):
    words = as_flags(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        output_dir="o",
        template="plain",
        dry_run=True,
    )
    for name in ("cuda:zz", "cuda:-1", "gpu"):
        done = command(*words, device=name)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            f"error: --device {name}: no such device. Use cpu, mps, cuda or cuda:N.\n"
        )
    for name in ("cuda", "cuda:7"):
        done = command(*words, device=name)
        assert done.returncode == 0 and "bfloat16 on 1 x cuda" in done.stdout, done.stderr


def test_processes_on_a_cpu_share_its_memory(checkpoint, rows_file, here, monkeypatch):
    monkeypatch.setattr(plan, "main_memory", lambda: 8 * 10**9)
    words = ("--dry_run", "--model_name_or_path", checkpoint, "--dataset", rows_file)
    words += ("--output_dir", "o", "--template", "plain", "--device", "cpu")
    words += ("--tokens_per_second", 100)
    for more, share in (([], "8.0"), (["--num_processes", 4], "2.0")):
        said = here(train, *words, *more)
        assert re.search(rf"fits        yes: \d+% of {share} GB", said), said
    stated = here(train, *words, "--num_processes", 4, "--device_memory", "8GB")
    assert "of 8.0 GB" in stated


def test_a_container_limits_the_memory(tmp_path):
    installed = plan.main_memory(tmp_path)  # without a limit
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    for text, limit in (("max", installed), ("1000000", 10**6), (str(2**62), installed)):
        (tmp_path / "fs/cgroup/memory.max").write_text(f"{text}\n")
        assert plan.main_memory(tmp_path) == limit


def test_mistakes_of_planning(checkpoint, rows_file, capsys, here):
    common = ["--dataset", rows_file, "--output_dir", "o"]
    with pytest.raises(UserError, match="downloads nothing. Put its config.json"):
        here(train, "--dry_run", "--model_name_or_path", "nobody/nothing", *common)
    with pytest.raises(UserError, match="--device_memory: 'much' is not a size"):
        here(
            train,
            "--dry_run",
            "--model_name_or_path",
            checkpoint,
            *common,
            "--template",
            "plain",
            "--device_memory",
            "much",
        )
    assert "model " not in capsys.readouterr().out  # refused before any output,
    with pytest.raises(UserError, match="Give --num_processes"):  # as in a run
        here(
            train,
            "--dry_run",
            "--model_name_or_path",
            checkpoint,
            *common,
            "--template",
            "plain",
            "--parallel",
            "fsdp",
        )
    for words, said in (
        (["--num_processes", "2"], "belongs to --dry_run"),
        (["--dry_run", "--device_tflops", "1", "--tokens_per_second", "1"], "contradicts"),
    ):
        with pytest.raises(UserError, match=said):
            parse_options(["--model_name_or_path", "-", *map(str, common), *words])


# Configs and files of shared/data in place of the models and data that the recipes name.
STAND_INS = {
    "tinyllama_lora": ("TinyLlama-1.1B-Chat-v0.6", "cherry_alpaca_5_percent.json"),
    "llama3_8b_lora": ("Meta-Llama-3-8B-Instruct", "alpaca_en_demo.json"),
    "llama3_8b_qlora": ("Meta-Llama-3-8B-Instruct", "alpaca_en_demo.json"),
    "llama3_8b_full": ("Meta-Llama-3-8B-Instruct", "alpaca_en_demo.json"),
    "chinese_1_pretrain": ("Llama-3.1-8B", "wiki_demo.txt"),
    "chinese_2_sft": ("Llama-3.1-8B", "alpaca_zh_demo.json"),
    "qwen25_chatml": ("Qwen2.5-7B-Instruct", "glaive_toolcall_zh_demo.json"),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_where_they_say(recipe, shared_data, here):
    config, rows = STAND_INS[recipe.stem]
    rows = shared_data / "instruct" / rows
    mixed = (
        ["--mix", f"{shared_data / 'instruct/c4_demo.jsonl'}:0.1"]
        if "mix =" in (recipe.read_text())
        else []
    )
    stated = re.search(r"(\d+)GB", recipe.read_text().split("model_name")[0])
    said = here(
        train,
        *as_flags(
            dry_run=True,
            config=recipe,
            model_name_or_path=shared_data / "configs" / config,
            dataset=rows,
            device="cuda",
            num_processes=8 if "full" in recipe.stem else 1,
            device_memory=f"{stated[1] if stated else 80}GB",
        ),
        *mixed,
    )
    assert "fits        yes" in said and "estimated" in said
    assert numbers(r"([\d,]+) in all", said)[0] > 1


def test_every_recipe_is_planned_and_names_its_command():
    assert {path.stem for path in RECIPES} == set(STAND_INS)
    for recipe in RECIPES:
        options = parse_options(["--config", str(recipe)])
        assert options.dataset and Path(options.output_dir).parts[0] == "runs"
