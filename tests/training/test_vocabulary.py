"""New tokens, from the command line to peft, transformers and llama.cpp: ids, logits, plans."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import CONFIG
from llama_cpp import Server
from parallel_runs import logged
from run_builder import training_options
from safetensors.torch import load_file

import chat
import export
import score
import train
from minisft.checkpoints.adapter_forms import tokenizer_dir
from minisft.checkpoints.adapters import load_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.checkpoints.gguf_export import export_model
from minisft.common.errors import UserError
from minisft.generation.assistant import Assistant
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.text.tokenizer import Tokenizer
from minisft.training import plan
from minisft.training.build import load_trainable, model_on_meta, num_trainable
from minisft.training.vocabulary import load_vocabulary, planned_rows

NUM_TOKENS = 284  # of the tiny tokenizer
SPECIAL, ORDINARY = "<|ask|>,<|say|>", "<svg>"
ALL = [*SPECIAL.split(","), ORDINARY]
TEMPLATE = (
    "{% for message in messages %}{{ '<|ask|>' if message.role == 'user' else '<|say|>' }}"
    "{{ message.content }}{{ eos_token if message.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<|say|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer_dir):
    """Bases with and without spare rows, tied and untied; rows; a template with the new tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for name, num_rows, is_tied in (
        ("exact", NUM_TOKENS, False),
        ("exact, tied", NUM_TOKENS, True),
        ("padded", 300, False),
        ("padded, tied", 300, True),
    ):
        torch.manual_seed(0)
        config = {**CONFIG, "vocab_size": num_rows, "tie_word_embeddings": is_tied}
        model = CausalLM(ModelConfig.from_dict(config))
        model.initialize()
        save_model(model, folder / name)
        for path in tiny_tokenizer_dir.iterdir():
            shutil.copy(path, folder / name)
    rows = [{"instruction": f"Draw {n}", "output": f"<svg> the cat {n}"} for n in range(16)]
    pairs = [{"instruction": f"Draw {n}", "output": ["<svg> the", f"hat {n}"]} for n in range(16)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "new.jinja").write_text(TEMPLATE)
    return folder


def words(folder, base, output, *more, **flags):
    """Words for train.py, with the three new tokens."""
    flags = {
        "new_special_tokens": SPECIAL,
        "add_tokens": ORDINARY,
        "dataset": folder / "rows.json",
        "template": folder / "new.jinja",
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        **flags,
    }
    listed = ["--model_name_or_path", folder / base, "--output_dir", output, *more]
    return [*listed, *(word for name, value in flags.items() for word in (f"--{name}", value))]


@torch.no_grad()
def our_logits(base, tokens, adapter=None, bits=None):
    model = load_model(base, quantization_bit=bits)
    if adapter:
        load_adapter(model, adapter)
    return model.logits(model(tokens))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def sentence(run_dir):
    """Ids (1, T) with all new tokens, as the template and a text write them."""
    tokenizer = Tokenizer.load(run_dir)
    ids = [tokenizer.token_id(token) for token in ALL]
    assert ids == [NUM_TOKENS, NUM_TOKENS + 1, NUM_TOKENS + 2]
    return torch.tensor(
        [[ids[0], *tokenizer.encode("Draw 3"), ids[1], *tokenizer.encode(" a<svg>")]]
    )


@pytest.mark.parametrize("base", ["exact", "exact, tied", "padded", "padded, tied"])
def test_an_adapter_everywhere(base, folder, tmp_path, here):
    """peft, transformers and llama.cpp compute from ours what we do, and with the same ids."""
    run_dir, base_dir = tmp_path / "run", folder / base
    here(train, *words(folder, base, run_dir))
    tokens = sentence(run_dir)
    assert NUM_TOKENS + 2 in tokens
    num_rows = 300 if "padded" in base else NUM_TOKENS + 3
    expected = our_logits(base_dir, tokens, run_dir)
    assert expected.shape[-1] == num_rows
    # peft resizes the base to the adapter's tokenizer by itself if that has more tokens.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(run_dir).eval()
    with torch.no_grad():
        assert_same(theirs(tokens).logits, expected)
    # The matrices were trained, the new rows too.
    stored = load_file(run_dir / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        rows = stored[f"base_model.model.{name}.weight"]
        assert rows.shape[0] == num_rows and len(rows[-3:].unique(dim=0)) > 1

    here(export, model_name_or_path=base_dir, adapter=run_dir, output_dir=tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_same(merged(tokens).logits, expected)
    question = [{"role": "user", "content": "Draw <svg> 3"}]
    prompt = Assistant(base_dir, run_dir, device="cpu").template.encode_prompt(question)
    assert prompt[0] == NUM_TOKENS and prompt[-1] == NUM_TOKENS + 1 and NUM_TOKENS + 2 in prompt
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    render = {"add_generation_prompt": True, "return_dict": False}
    assert theirs.apply_chat_template(question, **render) == prompt
    if base == "exact, tied":
        here(
            export,
            *("--model_name_or_path", base_dir, "--adapter", run_dir, "--format", "peft"),
            *("--output_dir", tmp_path / "again"),
        )
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        with torch.no_grad():
            assert_same(again(tokens).logits, expected)
    if base in ("exact", "padded, tied"):
        export_model(base_dir, tmp_path / "run.gguf", "f32", run_dir)
        with Server(tmp_path / "run.gguf") as server:
            assert server.tokenize("<|say|>a<svg>", parse_special=True) == [
                NUM_TOKENS + 1,
                *Tokenizer.load(run_dir).encode("a<svg>"),
            ]
            probabilities = server.log_probabilities(tokens[0].tolist(), num_rows)
        ours = torch.log_softmax(expected[0, -1], dim=-1).numpy()
        np.testing.assert_allclose(probabilities, ours, atol=1e-4)


def test_full_fine_tuning(folder, tmp_path, here):
    """A tied model stays tied; transformers and llama.cpp read the folder and its file."""
    run_dir = tmp_path / "run"
    here(train, *words(folder, "exact, tied", run_dir, "--finetuning_type", "full"))
    tokens = sentence(run_dir)
    expected = our_logits(run_dir, tokens)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_dir)
    assert theirs.config.vocab_size == NUM_TOKENS + 3 and theirs.config.tie_word_embeddings
    with torch.no_grad():
        assert_same(theirs(tokens).logits, expected)
    export_model(run_dir, tmp_path / "run.gguf", "f32")
    with Server(tmp_path / "run.gguf") as server:
        probabilities = server.log_probabilities(tokens[0].tolist(), NUM_TOKENS + 3)
    ours = torch.log_softmax(expected[0, -1], dim=-1).numpy()
    np.testing.assert_allclose(probabilities, ours, atol=1e-4)


@pytest.mark.parametrize("base", ["exact", "padded, tied"])
@pytest.mark.parametrize(
    "more", [[], ["--quantization_bit", "4"], ["--finetuning_type", "full"], ["--stage", "rm"]]
)
def test_new_rows_start_at_the_mean(base, more, folder):
    """Of the rows of tokens: a padded base has others, which mean nothing."""
    options = training_options(*map(str, words(folder, base, "-")), *more)
    _, config, new_rows = load_vocabulary(options, folder / base, None, print)
    model, _ = load_trainable(options, folder / base, torch.float32, torch.device("cpu"), new_rows)
    before = load_file(folder / base / "model.safetensors")
    for name in ["model.embed_tokens", *([] if "rm" in more else ["lm_head"])]:
        if name == "lm_head" and "tied" in base and "full" in more:
            continue
        weight = model.get_submodule(name).weight
        assert weight.requires_grad and weight.dtype == torch.float32
        assert len(weight) == config.vocab_size == (300 if "padded" in base else NUM_TOKENS + 3)
        old = before.get(f"{name}.weight", before["model.embed_tokens.weight"])
        assert torch.equal(weight[:NUM_TOKENS], old[:NUM_TOKENS])
        mean = old[:NUM_TOKENS].double().mean(dim=0).float()
        torch.testing.assert_close(weight[new_rows.start : new_rows.stop], mean.expand(3, -1))
        assert torch.equal(weight[new_rows.stop :], old[new_rows.stop :])
    planned = model_on_meta(options, ModelConfig.load(folder / base), torch.float32, new_rows)
    assert num_trainable(planned) == num_trainable(model)
    assert planned.config.vocab_size == model.config.vocab_size


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_preferences(stage, folder, tmp_path, here):
    """Logits and rewards are those of peft and transformers."""
    run_dir, data = tmp_path / "run", {"dataset": folder / "pairs.json"}
    here(train, *words(folder, "exact", run_dir, "--stage", stage, **data))
    tokens = sentence(run_dir)
    if stage == "dpo":
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(run_dir).eval()
        with torch.no_grad():
            assert_same(theirs(tokens).logits, our_logits(folder / "exact", tokens, run_dir))
        assert [row["loss"] for row in logged(run_dir)][0] == pytest.approx(np.log(2), rel=1e-5)
        return
    output = tmp_path / "scores.jsonl"
    here(
        score,
        *("--model_name_or_path", folder / "exact", "--adapter", run_dir, "--mode", "reward"),
        *("--dataset", folder / "rows.json", "--output", output),
    )
    assert len(output.read_text().splitlines()) == 16


def test_resume_is_exact_and_checkpoints_are_complete(folder, tmp_path, here):
    """A checkpoint is an adapter with its tokenizer, too."""
    for name, more in (
        ("one", []),
        ("two", ["--resume_from_checkpoint", tmp_path / "one/checkpoint-2"]),
    ):
        here(train, *words(folder, "exact, tied", tmp_path / name, *more, save_steps=2))
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    saved = tmp_path / "one/checkpoint-2"
    assert tokenizer_dir(folder / "exact, tied", saved) == saved
    assert Tokenizer.load(saved).token_id("<svg>") == NUM_TOKENS + 2
    changed = words(
        folder, "exact, tied", tmp_path / "three", new_special_tokens="<|ask|>,<|say|>,<c>"
    )
    with pytest.raises(UserError, match="is from a run with new_special_tokens <|ask|>"):
        here(train, *changed, "--resume_from_checkpoint", saved)


def test_adapter_and_base_are_enough(folder, tmp_path, here):
    """Training further, scoring and chatting take the tokens from the adapter."""
    run_dir, base = tmp_path / "run", folder / "padded"
    here(train, *words(folder, "padded", run_dir))
    common = ("--model_name_or_path", base, "--adapter", run_dir)
    data = ("--dataset", folder / "rows.json")
    here(score, *common, *data, "--output", tmp_path / "scores.jsonl")
    with pytest.raises(SystemExit) as end:
        here(chat, *common, "--prompt", "Draw <svg>", "--max_new_tokens", 4, "--device", "cpu")
    assert end.value.code == 0
    here(
        train,
        *(*common, *data, "--template", folder / "new.jinja", "--max_steps", 1),
        *("--learning_rate", 1e-9, "--output_dir", tmp_path / "further"),
    )
    tokens = sentence(tmp_path / "further")
    assert_same(our_logits(base, tokens, tmp_path / "further"), our_logits(base, tokens, run_dir))


def test_a_tokenizer_with_more_tokens_than_the_model(folder, tmp_path, here):
    """--resize_vocab: someone has added tokens to the tokenizer, and not to the model."""
    base = shutil.copytree(folder / "exact", tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([ORDINARY])
    tokenizer.save_pretrained(base)
    plain = {"new_special_tokens": "<|x|>", "template": "alpaca"}
    flags = words(tmp_path, "base", tmp_path / "run", dataset=folder / "rows.json", **plain)
    at = flags.index("--new_special_tokens")
    del flags[at : at + 4]  # and --add_tokens
    with pytest.raises(UserError, match="--resize_vocab"):
        here(train, *flags)
    out = here(train, *flags, "--resize_vocab")
    assert f"grows from {NUM_TOKENS} to {NUM_TOKENS + 1} rows" in out
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    tokens = torch.tensor([[5, NUM_TOKENS, 7]])
    with torch.no_grad():
        assert_same(theirs(tokens).logits, our_logits(base, tokens, tmp_path / "run"))
    flags[3], flags[1] = tmp_path / "none", folder / "padded"
    out = here(train, *flags, "--resize_vocab")
    assert "--resize_vocab: 300 rows are enough" in out
    assert "embed_tokens" not in (tmp_path / "none/adapter_config.json").read_text()


@pytest.mark.parametrize("base", ["exact", "padded, tied"])
def test_the_plan(base, folder, tmp_path, here):
    """--dry_run counts what the run trains, also without the tokenizer."""
    flags = words(folder, base, tmp_path / "run")
    planned = here(train, *flags, "--dry_run")
    trained = here(train, *flags)
    (number,) = [line.split()[5] for line in planned.splitlines() if line.startswith("model ")]
    assert f"training {number} of" in trained and number != "0"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / base / "config.json", bare)
    options = training_options(*map(str, words(tmp_path, "bare", "-")))
    rows = planned_rows(options, ModelConfig.load(bare), bare)
    assert len(rows) == 3 and rows.start == ModelConfig.load(bare).vocab_size
    plan.show(options)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--new_special_tokens", "<a>,,<b>"], "--new_special_tokens: token 2 is empty"),
        (["--new_special_tokens", ""], "--new_special_tokens: token 1 is empty"),
        (["--add_tokens", "<a>,<a>"], "--add_tokens: <a> is listed twice"),
        (["--add_tokens", "a\tb"], "token 1, 'a.tb', is not printable"),
        (["--new_special_tokens", "<a>", "--add_tokens", "<a>"], "<a> is in --new_special_tokens"),
        (["--resize_vocab", "--adapter", "x"], "--resize_vocab contradicts --adapter"),
        (["--add_tokens", "<a>", "--lora_target", "lm_head"], "--lora_target names lm_head"),
        (["--add_special_tokens", "<a>"], "did you mean --new_special_tokens"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        training_options(*flags)


def test_a_token_that_exists(folder, tmp_path, here):
    with pytest.raises(UserError, match="the token </s> exists already, with the id 1"):
        here(train, *words(folder, "exact", tmp_path / "out", new_special_tokens="</s>"))
    assert not (tmp_path / "out").exists()


def test_rows_that_spell_a_special_token(folder, tmp_path, here):
    out = here(
        train,
        *words(folder, "exact", tmp_path / "run", new_special_tokens="<svg>", add_tokens="<b>"),
        *("--template", "plain"),
    )
    assert "16 of the first 16 rows spell <svg>. It stays text there" in out
