"""LoRA against peft: each reads the adapters of the other, and merging changes no result."""

import copy
import json
from weakref import ref

import peft
import pytest
import torch
import transformers
from conftest import CONFIG
from run_builder import training_options

from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.checkpoints.reward_models import load_reward_model
from minisft.common.errors import UserError
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import ALL, LoraConfig, LoRALinear, add_lora, merge_lora
from minisft.model.quantized import QuantizedLinear
from minisft.training.lora_options import check_targets, lora_from_options

ADAPTERS = {
    "attention": LoraConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj")),
    "all": LoraConfig(rank=8, alpha=16),
    "rslora": LoraConfig(rank=8, alpha=16, use_rslora=True),
    "saved modules": LoraConfig(rank=4, alpha=8, modules_to_save=("embed_tokens", "lm_head")),
    "saved embedding": LoraConfig(rank=4, alpha=8, modules_to_save=("embed_tokens",)),
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base_dir(request, tmp_path):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**CONFIG, "tie_word_embeddings": request.param}))
    model.initialize()
    save_model(model, tmp_path / "base")
    return tmp_path / "base"


def randomize(model):
    """Change all trainable parameters, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def logits(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens))


TOKENS = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_reads_ours(name, base_dir, tmp_path):
    model = load_model(base_dir)
    before = logits(model, TOKENS)
    add_lora(model, ADAPTERS[name])
    assert torch.equal(logits(model, TOKENS), before)  # B is zero: bit for bit the base
    randomize(model)
    save_adapter(model, tmp_path / "adapter", ADAPTERS[name], base_dir)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(logits(model, TOKENS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_we_read_peft(name, base_dir, tmp_path):
    config = ADAPTERS[name]
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules="all-linear" if config.target_modules == ALL else ["q_proj", "v_proj"],
            use_rslora=config.use_rslora,
            modules_to_save=list(config.modules_to_save) or None,
            task_type="CAUSAL_LM",
        ),
    )
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(base_dir)
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs.eval()(TOKENS).logits
    torch.testing.assert_close(logits(ours, TOKENS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["all", "all-linear", "q_proj,down_proj"])
def test_targets_by_name_are_those_of_peft(target, base_dir):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    names = target.split(",") if "," in target else "all-linear"
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=names, task_type="CAUSAL_LM"))
    ours = load_model(base_dir)
    add_lora(ours, lora_from_options(training_options(lora_target=target)))
    adapted = [name for name, module in ours.named_modules() if isinstance(module, LoRALinear)]
    assert sorted(adapted) == sorted(theirs.base_model.targeted_module_names)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_equals_unmerged(name, base_dir, tmp_path):
    model = load_model(base_dir)
    add_lora(model, ADAPTERS[name])
    randomize(model)
    expected = logits(model, TOKENS)
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(logits(model, TOKENS), expected, rtol=1e-5, atol=1e-5)
    save_model(model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(TOKENS).logits, logits(model, TOKENS), rtol=1e-5, atol=1e-5
        )


def test_merging_casts_once(base_dir):
    """A merged bfloat16 weight is the float32 sum, rounded; not a sum of rounded parts."""
    model = load_model(base_dir, torch.bfloat16)
    add_lora(model, ADAPTERS["attention"])
    randomize(model)
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.float()
    expected = weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    merge_lora(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected.bfloat16())


def test_trained_parameters(base_dir):
    """The adapter and modules_to_save, in float32, also with a bfloat16 base."""
    model = load_model(base_dir, torch.bfloat16)
    add_lora(model, LoraConfig(target_modules=("q_proj",), modules_to_save=("lm_head",)))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or name == "lm_head.weight")
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert not model.config.tie_word_embeddings


def test_dropout_is_on_the_adapter_only(base_dir):
    model = load_model(base_dir)
    plain = copy.deepcopy(model)
    add_lora(model, LoraConfig(dropout=0.5))
    model.train()
    # B is zero, so if the base saw dropout the result would change.
    assert torch.equal(logits(model, TOKENS), logits(plain, TOKENS))
    randomize(model)
    assert not torch.equal(logits(model, TOKENS), logits(model, TOKENS))
    model.eval()
    assert torch.equal(logits(model, TOKENS), logits(model, TOKENS))


def test_initial_values_are_those_of_peft():
    """A: kaiming uniform with a = sqrt(5), that is uniform within 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(400, 50), LoraConfig(rank=64))
    assert layer.lora_A.weight.abs().max() <= 1 / 20
    assert abs(layer.lora_A.weight.std().item() - 1 / 20 / 3**0.5) < 1e-3
    assert not layer.lora_B.weight.any()


def test_full_names_select_what_short_names_select():
    options = training_options(modules_to_save="model.embed_tokens,model.norm, lm_head")
    config = lora_from_options(options)
    assert config.modules_to_save == ("embed_tokens", "model.norm", "lm_head")
    model = CausalLM(ModelConfig.from_dict({**CONFIG, "tie_word_embeddings": True}))
    add_lora(model, config)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    names = {f"{name}.weight" for name in ("model.embed_tokens", "model.norm", "lm_head")}
    assert {name for name in trained if ".lora_" not in name} == names


def test_mistakes_are_named(base_dir, tmp_path):
    with pytest.raises(UserError, match="wq"):
        check_targets(load_model(base_dir), LoraConfig(target_modules=("wq",)))
    with pytest.raises(UserError, match="--lora_target: no linear layer is named"):
        check_targets(load_model(base_dir), LoraConfig(target_modules=()))
    both = LoraConfig(target_modules=("score",), modules_to_save=("score",))
    with pytest.raises(UserError, match="score is in --lora_target and in --modules_to_save"):
        check_targets(load_reward_model(base_dir), both)
    with pytest.raises(UserError, match="wte"):
        add_lora(load_model(base_dir), LoraConfig(modules_to_save=("wte",)))
    model = load_model(base_dir)
    add_lora(model, ADAPTERS["attention"])
    save_adapter(model, tmp_path / "adapter", ADAPTERS["attention"], base_dir)
    other = CausalLM(ModelConfig.from_dict({**CONFIG, "hidden_size": 64}))
    with pytest.raises(UserError, match="base model"):
        load_adapter(other, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "modules_to_save": ["lm_head"]}))
    with pytest.raises(UserError, match="tensors are missing: lm_head.weight"):
        load_adapter(load_model(base_dir), tmp_path / "adapter")
    path.write_text(json.dumps({**content, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        load_adapter(load_model(base_dir), tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layers\.1\.(self_attn\.q_proj|mlp\.up_proj)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=["regex", "all-linear", "rank_pattern", "one layer"],
)
def test_unusual_adapters_survive_loading_and_saving(settings, base_dir, tmp_path):
    """peft -> ours -> peft keeps the adapted modules and their ranks."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    )
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(base_dir)
    config = load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", config, base_dir)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs.eval()(TOKENS).logits
        torch.testing.assert_close(again(TOKENS).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(ours, TOKENS), expected, rtol=0, atol=1e-6)


def test_adapters_that_change_the_base_are_refused(base_dir, tmp_path):
    """PiSSA moves part of the base into the adapter, which does not fit the plain base."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="pissa"):
        load_adapter(load_model(base_dir), tmp_path / "adapter")


@pytest.mark.parametrize("bits", [None, 8])
def test_merging_frees_layer_after_layer(bits, base_dir, monkeypatch):
    """While an adapter is merged, all that came before have left the memory."""
    model, num_alive, kinds = load_model(base_dir, quantization_bit=bits), [], [LoRALinear]
    add_lora(model, LoraConfig(target_modules=("q_proj", "v_proj")))
    if bits:
        kinds.append(QuantizedLinear)
    old = [ref(module) for module in model.modules() if isinstance(module, tuple(kinds))]
    for kind in kinds:

        def counting_merged(self, dtype, merged=kind.merged):
            num_alive.append(sum(module() is not None for module in old))
            return merged(self, dtype)

        monkeypatch.setattr(kind, "merged", counting_merged)
    num_adapted = 2 * model.config.num_hidden_layers
    merge_lora(model)
    step = 2 if bits else 1  # a LoRALinear and the quantised layer in it
    assert num_alive[:num_adapted] == list(range(len(old), len(old) - step * num_adapted, -step))
    rest = len(old) - step * num_adapted
    assert num_alive[num_adapted:] == list(range(rest, 0, -1))
