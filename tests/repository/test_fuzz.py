"""Damaged and hostile files: each either works or gives one clear line that names the place.

The test mutates checkpoints, tokenizers, adapters, data and the files of a run, as bytes and as
JSON, and uses them: nothing may hang, crash, raise another error or fill memory.
"""

import copy
import json
import random
import resource
import signal
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standing import HANG_SECONDS

import train
from minisft.checkpoints import adapters, folders
from minisft.common.errors import UserError
from minisft.common.outputs import recorded_options
from minisft.common.tensor_files import read_header
from minisft.data import batching, dataset, encoding
from minisft.data.build_batches import batches_of_rows, batches_of_texts
from minisft.data.encode_texts import encode_texts
from minisft.generation.generate import Sampling, generate
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora, merge_lora
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training import checkpoint

EXAMPLES = 40  # of each kind
MORE_MEMORY = 2 * 2**30
CONVERSATION = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat "}]
ROWS = {
    "alpaca.json": [
        {
            "instruction": "Say it.",
            "input": "the cat",
            "output": "sat",
            "system": "s",
            "history": [["the rat", "sat"]],
        },
        {"instruction": "on", "output": "the mat"},
    ],
    "sharegpt.json": [
        {
            "conversations": [
                {"from": "human", "value": "the"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "5"},
                {"from": "gpt", "value": "five"},
            ],
            "tools": '[{"name": "f"}]',
        }
    ],
    "openai.json": [
        {
            "messages": [
                *CONVERSATION,
                CONVERSATION[0],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1]}'}}],
                },
            ]
        }
    ]
    * 2,
    "firefly.json": [{"kind": "k", "input": "the cat", "target": "sat"}],
}
ENTRY = {
    "file_name": "openai.json",
    "formatting": "openai",
    "num_samples": 2,
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
    },
}


class Hang(BaseException):
    """An example that took too long."""


# The files to mutate


def make_model(**changes):
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig.from_dict(
            {
                **CONFIG,
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "max_position_embeddings": 64,
                **changes,
            }
        )
    )
    model.initialize()
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer_dir):
    """{kind: {path below the folder of that kind: bytes}} of sound files."""
    root = tmp_path_factory.mktemp("sound")
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    folders.save_model(make_model(rope_scaling=rope), root / "checkpoint")
    folders.save_model(make_model(), root / "shards", max_shard_size=12_000)
    model = make_model()
    config = LoraConfig(rank=2, modules_to_save=("lm_head",))
    add_lora(model, config)
    adapters.save_adapter(model, root / "adapter", config, "base")
    for folder in ("checkpoint", "shards", "adapter"):
        for path in tiny_tokenizer_dir.iterdir():
            (root / folder / path.name).write_bytes(path.read_bytes())
        (root / folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    folders.save_model(model.__class__(model.config), root / "adapter" / "base")
    make_tokenizers(root, tiny_tokenizer_dir)
    make_data(root / "data")
    make_run(root / "run")
    kinds = {}
    for folder in root.iterdir():
        kinds[folder.name] = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return kinds


def make_tokenizers(root, tiny_tokenizer_dir):
    """A byte-level tokenizer.json with all its neighbours, and a bare tokenizer.model."""
    (root / "tokenizer").mkdir()
    (root / "pieces").mkdir()
    for path in tiny_tokenizer_dir.iterdir():
        (root / "tokenizer" / path.name).write_bytes(path.read_bytes())
    entry = {
        "content": "<extra>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    for folder in ("tokenizer", "pieces"):
        config = {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "pad_token": None,
            "add_bos_token": True,
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "chat_template": "<|im_start|>{{ x }}<|im_end|>",
            "added_tokens_decoder": {"290": entry},
        }
        others = {
            "tokenizer_config.json": config,
            "added_tokens.json": {"<more>": 291},
            "special_tokens_map.json": {"unk_token": "<unk>"},
            "config.json": {"pad_token_id": 0},
            "chat_template.json": {"chat_template": [{"name": "default", "template": "x"}]},
        }
        for name, content in others.items():
            (root / folder / name).write_text(json.dumps(content))
    text = ["the cat sat on the mat and the rat sat on the hat"] * 50
    with open(root / "pieces" / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            vocab_size=280,
            byte_fallback=True,
            model_type="bpe",
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            minloglevel=2,
        )


def make_data(folder):
    folder.mkdir()
    for name, rows in ROWS.items():
        (folder / name).write_text(json.dumps(rows, indent=1))
        (folder / f"{name}l").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "dataset_info.json").write_text(json.dumps({"named": ENTRY}))
    (folder / "text.txt").write_text("the cat sat\n\non the mat\n" * 3)


def make_run(folder):
    """A checkpoint of a run with its options."""
    model = make_model().requires_grad_(True)
    state = {"progress": {"step": 4}, "random": [{"cpu": torch.get_rng_state()}]}
    with checkpoint.new_checkpoint(folder, 4) as path:
        folders.save_model(model, path)
        checkpoint.save_state(state, path)
    (folder / "options.toml").write_text(
        'template = "plain"\nlearning_rate = 0.01\ndataset = ["a", "b"]\nseed = 3\nbf16 = false\n'
    )


# How the files are used


def use_checkpoint(folder):
    use_tokenizer(folder)
    model = folders.load_model(folder)
    use_model(folder, model)


def use_model(folder, model):
    model.config.to_dict()
    stop = folders.generation_eos(folder, model.config)
    tokenizer = Tokenizer.load(folder)
    stop_ids = get_template("plain", tokenizer).stop_token_ids(stop)
    prompt = min(40, model.config.context_length) * [model.config.vocab_size - 1]
    generate(model, [prompt], Sampling(3, greedy=True), stop_ids)


def use_adapter(folder):
    model = folders.load_model(folder / "base")
    adapters.load_adapter(model, folder)
    merge_lora(model)
    use_model(folder, model)


def use_tokenizer(folder):
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(range(300), skip_special_tokens=False)
    for name in ("plain", "chatml", "alpaca", "auto"):
        rows = [dataset.Row(CONVERSATION, source=str(folder))]
        try:
            template = get_template(name, tokenizer)
            examples, _ = encoding.encode_rows(rows, template, 32, 300)
        except UserError as error:
            if name != "auto" and str(folder) not in str(error):
                raise
            continue  # a broken chat template is refused with a reason
        make_batch(examples)
    encode_texts(["the cat <s> 中文 \0"], tokenizer, 8, 2**20)


def make_batch(examples):
    tokens, _, _ = batching.collate(examples)
    assert tokens.min() >= 0 and tokens.max() < 300


def use_data(folder):
    tokenizer = Tokenizer.load(folder.parent / "tokenizer_of_data")
    template = get_template("plain", tokenizer)
    for path in sorted(folder.glob("*.json*")):
        name = "named" if path.name == "dataset_info.json" else str(path)
        rows = dataset.open_rows(name, dataset_dir=folder, say=lambda text: None)
        batches = batches_of_rows(rows, template, 1000, 300)
        make_batch(next(iter(batches.steps(2, 0, 1))))
        dataset.open_rows(name, dataset_dir=folder, skipped=[], say=lambda text: None)
    texts = dataset.open_rows(folder / "text.txt", plain_text=True)
    make_batch(next(iter(batches_of_texts(texts, tokenizer, 8, 300).steps(2, 0, 1))))


def use_run(folder):
    found = checkpoint.find_checkpoint(folder, "auto", lambda text: None)
    read_header(folder / "checkpoint-4" / "model.safetensors")
    checkpoint.load_state(folder / "checkpoint-4")
    if found:
        checkpoint.restore_weights(make_model().requires_grad_(True), found)
    recorded_options(folder)
    train.parse_options(
        [
            "--config",
            str(folder / "options.toml"),
            "--output_dir",
            "out",
            "--model_name_or_path",
            "base",
        ]
    )


USES = {
    "checkpoint": use_checkpoint,
    "shards": use_checkpoint,
    "adapter": use_adapter,
    "tokenizer": use_tokenizer,
    "pieces": use_tokenizer,
    "data": use_data,
    "run": use_run,
}


# How the files are mutated

NASTY = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    10**6,
    2**31,
    2**63,
    -(2**63),
    10**40,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "1",
    "\0",
    "\ud83d",
    "\n\x1b[2J",
    "../../etc/passwd",
    "a" * 10**5,
    "中文",
    "<s>",
    "full_attention",
    "F64",
    "I64",
    [],
    {},
    [[]],
    [None],
    [1, 2],
    ["a", "a"],
    {"a": 1},
    [0] * 10**4,
    {"content": 5},
    [-1, 2**70],
]


def mutate_bytes(content, generator):
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 8])):
        at = generator.randrange(len(content) + 1)
        end = min(len(content), at + generator.choice([1, 2, 8, 100]))
        how = generator.choice([0, 1, 2, 3, 4, 5, 5, 5, 5])  # mostly small ones
        if how == 0:
            del content[at:]
        elif how == 1:
            del content[at:end]
        elif how == 2:
            content[at:at] = generator.randbytes(generator.choice([1, 8, 100]))
        elif how == 3:
            content[at:at] = content[at:end]
        elif how == 4:
            content[at:end] = generator.randbytes(end - at)
        elif content:
            content[min(at, len(content) - 1)] ^= 1 << generator.randrange(8)
    return bytes(content)


def places(value):
    """Every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value or ())
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def mutate_json(content, generator):
    """Values replaced, keys dropped, renamed and repeated."""
    value = json.loads(content)
    for _ in range(generator.choice([1, 1, 1, 2, 5])):
        found = list(places(value))
        if not found:
            break
        # Prefer places near the top to places in the long lists of a vocabulary.
        container, key = found[int(len(found) * generator.random() ** generator.choice([1, 4]))]
        how = generator.randrange(5)
        if how <= 1:
            container[key] = copy.deepcopy(generator.choice(NASTY))
        elif how == 2:
            del container[key]
        elif how == 3 and isinstance(container, dict):
            container[generator.choice([*container, "x", ""])] = container.pop(key)
        else:
            container[key] = copy.deepcopy(generator.choice(found)[0])
    text = json.dumps(value)
    if generator.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.encode()


def mutate(name, content, generator):
    if generator.random() < 0.4:
        return mutate_bytes(content, generator)
    if name.endswith(".json"):
        return mutate_json(content, generator)
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        number = generator.randrange(len(lines))
        lines[number] = mutate_json(lines[number], generator)
        return b"\n".join(lines)
    if name.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")
        header = mutate_json(content[8 : 8 + length], generator)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    return mutate_bytes(content, generator)


# The test


@pytest.fixture
def limits():
    """Address space and time are limited while the examples run."""

    def stop(number, frame):
        raise Hang(f"more than {HANG_SECONDS} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, hard))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", USES)
def test_works_or_reports_the_error(kind, files, limits, tmp_path, tiny_tokenizer_dir):
    (tmp_path / "tokenizer_of_data").symlink_to(tiny_tokenizer_dir)
    folder, sound = tmp_path / kind, files[kind]
    for name, content in sound.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    USES[kind](folder)  # without a mutation, it works
    outcomes, peak = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(name=st.sampled_from(sorted(sound)), seed=st.integers(0, 2**32))
    def check(name, seed):
        generator = random.Random(seed)
        (folder / name).write_bytes(mutate(name, sound[name], generator))
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            USES[kind](folder)
            outcomes.append(None)
        except UserError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 2500, message
            # The error names the file. For readable rows and recipes it may name the flag instead.
            places = [str(folder), Path(name).name, *(["--"] if kind in ("data", "run") else [])]
            # A flipped bit can make a weight huge. The model reports that, without a file name.
            places += ["logits are not finite. Its weights are damaged"]
            assert any(place in message for place in places), message
            outcomes.append(message)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            (folder / name).write_bytes(sound[name])

    check()
    assert len(outcomes) >= EXAMPLES
    worked = outcomes.count(None)
    assert 0 < worked < len(outcomes), "the mutations are too strong or too weak to tell"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 2**19, f"memory grew by {grown} KB"
