"""--optim adamw_8bit and --pure_bf16: the numbers, the runs, the processes."""

import json
import math
import re

import bitsandbytes
import pytest
import torch
from conftest import CONFIG, as_flags
from parallel_runs import (
    assert_equal_runs,
    assert_like_one_process,
    final,
    flags,
    logged,
    resumed,
    train_forked,
    write_bases,
)
from run_builder import training_options
from safetensors.torch import load_file

from minisft.common.errors import UserError
from minisft.common.metric_lines import read_metrics
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.level_table import LevelTable
from minisft.model.quantized import dynamic_levels, nearest
from minisft.training import checkpoint, plan
from minisft.training.activation_memory import Step
from minisft.training.build import describe_training
from minisft.training.low_memory_adamw import (
    LowMemoryAdamW,
    dequantize_rows,
    moment_bytes,
    quantize_rows,
    round_stochastically,
)

# The fixture costs much, so one worker gets all tests.
pytestmark = pytest.mark.xdist_group("low_memory")

RATE, DECAY = 1e-3, 0.1


def optimizer_of(parameter, eight_bit, seed=1, decay=DECAY):
    """Our optimizer of a single parameter."""
    groups = [{"params": [parameter], "weight_decay": decay}]
    return LowMemoryAdamW(groups, RATE, (0.9, 0.999), 1e-8, eight_bit, seed)


def test_levels_equal_bitsandbytes():
    for signed in (True, False):
        theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(dynamic_levels(signed), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(40, 512), (7, 300)])
def test_a_step_in_8_bits_equals_bitsandbytes(shape):
    """From the same state, both optimizers write the same bytes, scales and weights.

    Their blocks may cross rows, so theirs gets every row as a parameter.
    """
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape) * 0.02)
    theirs = [torch.nn.Parameter(row.clone()) for row in ours.detach()]
    optimizer = optimizer_of(ours, eight_bit=True)
    oracle = bitsandbytes.optim.AdamW8bit(theirs, RATE, weight_decay=DECAY, min_8bit_size=0)
    for _ in range(6):
        ours.grad = torch.randn(shape) * 1e-3
        for row, gradient in zip(theirs, ours.grad, strict=True):
            row.grad = gradient.clone()
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(ours.detach(), torch.stack(list(theirs)), rtol=1e-5, atol=1e-8)
        state = optimizer.state[ours]
        for number, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
            states = [oracle.state[row] for row in theirs]
            scales = torch.stack([one[f"absmax{number}"] for one in states])
            torch.testing.assert_close(state[f"{name}_scale"], scales, rtol=1e-5, atol=0)
            codes = torch.stack([one[f"state{number}"] for one in states])
            codes = codes.clamp(min=1) if number == 2 else codes  # ours is never 0
            # Their kernel for the CPU finds levels in a table, whose steps are wide near zero.
            levels, indices = dynamic_levels(number == 1), state[name].int()
            is_next = (indices - codes.int()).abs() <= 1
            assert (is_next | ((levels[indices] - levels[codes.int()]).abs() < 5e-5)).all()
            assert (state[name] != codes).float().mean() < 0.05
            for one, code, scale in zip(states, state[name], state[f"{name}_scale"], strict=True):
                one[f"state{number}"].copy_(code)
                one[f"absmax{number}"].copy_(scale)


@pytest.mark.parametrize("shape", [(5, 70), (9,)])
def test_with_float32_moments_it_is_torchs_adamw(shape):
    """Vectors keep float32 with 8 bits, too."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = optimizer_of(ours, eight_bit=len(shape) == 1)
    oracle = torch.optim.AdamW([theirs], RATE, weight_decay=DECAY)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_parameters_are_updated_in_pieces(dtype, monkeypatch):
    """The bits do not depend on the size of a piece."""
    results = []
    for piece in (2**20, 700):
        monkeypatch.setattr("minisft.training.low_memory_adamw.PIECE_ON_CPU", piece)
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(11, 300).to(dtype))
        optimizer = optimizer_of(parameter, eight_bit=True)
        for _ in range(3):
            parameter.grad = torch.randn(11, 300).to(dtype)
            optimizer.step()
        results.append([parameter.detach(), *optimizer.state[parameter].values()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_becomes_the_nearest_level(signed):
    torch.manual_seed(0)
    values, levels = torch.randn(4, 512) ** (1 if signed else 2), dynamic_levels(signed)
    indices, scales = quantize_rows(values, LevelTable(levels))
    scaled = values / scales.repeat_interleave(256, 1)
    errors = (scaled[..., None] - levels).abs()
    torch.testing.assert_close(errors.amin(-1), (scaled - levels[indices.int()]).abs())


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_finds_the_same_levels(signed):
    """Also at the middle between two levels, at their neighbours, and at tiny numbers."""
    torch.manual_seed(0)
    levels = dynamic_levels(signed)
    middles = (levels[:-1] + levels[1:]) / 2
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    drawn = torch.rand(100_000) * 2 - 1
    edges = [middles, middles.nextafter(up), middles.nextafter(down), levels]
    values = torch.cat([*edges, drawn, drawn**9, drawn * 1e-30, torch.zeros(1), -torch.zeros(1)])
    assert torch.equal(LevelTable(levels).nearest(values), nearest(values, levels))


def test_blocks_of_a_row():
    """A block of its own for each 256 numbers of a row, zeros and large numbers alike."""
    values = torch.zeros(3, 300)
    values[1] = torch.linspace(-5, 7, 300)
    values[2, 299] = 1e-20
    levels = dynamic_levels()
    indices, scales = quantize_rows(values, LevelTable(levels))
    assert indices.shape == (3, 300) and scales.shape == (3, 2)
    assert torch.equal(
        scales, torch.stack([values[:, :256].abs().amax(1), values[:, 256:].amax(1)], 1)
    )
    restored = dequantize_rows(indices, scales, levels)
    assert (restored - values).abs().max() < 0.02 * 7 and restored[2, 299] == values[2, 299]
    assert not restored[0].any()


def test_a_small_mean_square_does_not_vanish():
    """Without a gradient, m would be divided by eps: a leap of hundreds of steps."""
    parameter = torch.nn.Parameter(torch.zeros(1, 256))
    optimizer = optimizer_of(parameter, eight_bit=True, decay=0.0)
    gradient = torch.ones(1, 256)
    gradient[0, 1:] = 1e-4  # its square is 1e-8 of the largest
    parameter.grad = gradient
    for _ in range(3):
        optimizer.step()
    before, parameter.grad = parameter.detach().clone(), torch.zeros_like(gradient)
    optimizer.step()
    assert 0 < (parameter - before).abs().max() < 3 * RATE


@pytest.mark.parametrize("step", [0, 1, 12_345])
def test_stochastic_rounding_is_unbiased_and_repeats(step):
    values = torch.cat([torch.full((40_000,), value) for value in (1.001, -1.001, 1.0, -1.17e-38)])
    draw = lambda seed, step: round_stochastically(  # noqa: E731
        values, torch.Generator().manual_seed(seed), step
    )
    rounded = draw(0, step)
    assert torch.equal(rounded, draw(0, step))
    assert not torch.equal(rounded, draw(1, step)) and not torch.equal(rounded, draw(0, step + 1))
    for exact, part in zip(values.split(40_000), rounded.split(40_000), strict=True):
        distance = 2**-7 * exact[0].abs()  # between neighbours, at most
        assert ((part.float() - exact).abs() < distance).all()
        assert (part.double().mean() - exact[0].double()).abs() < 0.01 * distance
    assert torch.equal(rounded[80_000:120_000], values[80_000:120_000].bfloat16())
    bits = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32)  # NaN of a GPU, and another
    assert round_stochastically(bits.view(torch.float32), torch.Generator(), step).isnan().all()


@pytest.mark.parametrize("signal", [0.0, 1.0], ids=["noise", "gradients that agree"])
def test_rounding_errors_of_consecutive_steps_cancel(signal):
    """The error after 200 steps of Adam, beside that of independent random numbers.

    It stays so if another parameter has no gradient in some steps.
    """
    torch.manual_seed(0)
    start = (torch.randn(20_000) * 0.05).bfloat16()
    weights = {kind: torch.nn.Parameter(start.clone()) for kind in ("spread", "independent")}
    weights["exact"] = torch.nn.Parameter(start.float())
    other = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    groups = lambda weight: [{"params": [other, weight], "weight_decay": DECAY}]  # noqa: E731
    optimizers = {
        kind: LowMemoryAdamW(groups(weight), RATE, (0.9, 0.999), 1e-8, eight_bit=False, seed=1)
        for kind, weight in weights.items()
    }
    independent = torch.Generator().manual_seed(1)
    optimizers["independent"].to_bfloat16 = lambda values, _, step: round_stochastically(
        values, independent, step
    )
    for step in range(200):
        gradient = (signal * math.exp(-step / 60) + torch.randn(20_000)).bfloat16()
        other.grad = torch.ones_like(other) if step % 3 else None
        for kind, weight in weights.items():
            optimizers[kind].param_groups[0]["lr"] = 5e-5 * (1 + math.cos(math.pi * step / 200))
            weight.grad = gradient.to(weight.dtype)
            optimizers[kind].step()
    error = {kind: (weight - weights["exact"]).square().mean() for kind, weight in weights.items()}
    assert error["spread"] < 0.5 * error["independent"]


def test_ranks_draw_other_numbers_only_for_other_rows(monkeypatch):
    """With DDP all ranks must round alike; with FSDP the rows of a rank are its own."""
    weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    optimizer, drawn = optimizer_of(weight, False), {}
    for rank in (0, 1):
        for is_sharded in (False, True):
            monkeypatch.setattr("minisft.common.processes.rank", lambda rank=rank: rank)
            monkeypatch.setattr(
                "minisft.common.processes.is_sharded", lambda _, answer=is_sharded: answer
            )
            generator = optimizer._generator(weight, number=0)
            drawn[is_sharded, rank] = torch.rand(1, generator=generator).item()
    assert drawn[False, 0] == drawn[False, 1] == drawn[True, 0] != drawn[True, 1]


def test_small_updates_of_bfloat16_weights_add_up():
    """500 steps of 1e-4: each is a fortieth of the distance between neighbours."""
    moved = {}
    for kind in ("stochastic", "nearest"):
        weight = torch.nn.Parameter(torch.ones(2, 600, dtype=torch.bfloat16))
        optimizer = optimizer_of(weight, eight_bit=True, decay=0.0)
        if kind == "nearest":
            optimizer.to_bfloat16 = lambda values, *_: values.bfloat16()
        optimizer.param_groups[0]["lr"] = 1e-4
        for _ in range(500):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[kind] = 1 - weight.float().mean().item()
        # They have moved equally far, but for three neighbours; independent numbers: about twenty.
        assert weight.max() - weight.min() <= 3 * 2**-8
    assert moved["stochastic"] == pytest.approx(0.05, rel=0.05) and moved["nearest"] == 0


def test_bytes_of_the_moments():
    for shape in [(5, 700), (9,), (6, 512)]:
        for eight_bit in (True, False):
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
            state = optimizer_of(parameter, eight_bit).prepare(parameter)
            held = sum(tensor.nbytes for name, tensor in state.items() if name != "step")
            assert held == moment_bytes(parameter, eight_bit)
    assert moment_bytes(torch.zeros(4096, 4096), True) / 4096**2 < 2.04


# Runs

FULL = ["--finetuning_type", "full", "--weight_decay", 0.1]
SMALL = ["--optim", "adamw_8bit"]
HALF = ["--pure_bf16"]
KINDS = {
    "8 bits": ["--model_name_or_path", "tied", *FULL, *SMALL, "--dtype", "float32"],
    "bf16": ["--model_name_or_path", "plain", *FULL, *HALF],
    "8 bits, bf16": ["--model_name_or_path", "tied", *FULL, *SMALL, *HALF],
}
SHORT = {
    "dpo, bf16": ["--stage", "dpo", "--dataset", "pairs.json", *KINDS["8 bits, bf16"]],
    "rm, bf16": ["--stage", "rm", "--dataset", "pairs.json", *KINDS["8 bits, bf16"]],
    "scratch, bf16": ["--train_from_scratch", *KINDS["8 bits, bf16"]],
    "new tokens, 8 bits": [
        *("--model_name_or_path", "plain", *SMALL, "--add_tokens", "<a>,<b>", "--dtype", "float32"),
    ],
}


def planned():
    for name, words in KINDS.items():
        yield flags(1, f"{name}/1", *words)
        yield [*flags(1, f"{name}/1 again", *words), 3]
        yield resumed(1, f"{name}/1 again", *words, "auto")
        yield flags(2, f"{name}/2", *words, "--save_steps", 3)
        if "8 bits" in name:
            yield flags(2, f"{name}/ddp", *words, kind="ddp")
    yield [*flags(2, "8 bits, bf16/2 again", *KINDS["8 bits, bf16"]), 3]
    yield resumed(2, "8 bits, bf16/2 again", *KINDS["8 bits, bf16"], "auto")
    # Sharded, and then not, and the other way round.
    yield resumed(1, "8 bits/2-1", *KINDS["8 bits"], "8 bits/2/checkpoint-3")
    yield resumed(2, "8 bits/1-2", *KINDS["8 bits"], "8 bits/1 again/checkpoint-4")
    for name, words in SHORT.items():
        for processes in (1, 2):
            yield flags(processes, f"{name}/{processes}", *words, "--max_steps", 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer_dir):
    """The folder of all runs, made by a single process that forks."""
    folder = tmp_path_factory.mktemp("low_memory")
    write_bases(folder, tiny_tokenizer_dir)
    outputs = ["the cat sat " * (1 + 7 * number % 11) for number in range(24)]
    rows = [{"instruction": "go", "output": output} for output in outputs]
    pairs = [{"instruction": "go", "output": [output, "no " * 3]} for output in outputs]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    train_forked(folder, planned())
    return folder


@pytest.mark.parametrize(
    ("kind", "processes"),
    [("8 bits", 1), ("bf16", 1), ("8 bits, bf16", 1), ("8 bits, bf16", 2)],
)
def test_resumed_is_exact(kind, processes, runs):
    """Bit for bit, random rounding included. A signal stops the run in its fourth step."""
    assert len(logged(runs / kind / str(processes))) == 6
    assert (runs / kind / f"{processes} again" / "checkpoint-4").is_dir()
    assert_equal_runs(runs / kind / str(processes), runs / kind / f"{processes} again", 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_types_of_a_checkpoint(kind, runs):
    path = next((runs / kind / "1 again").glob("checkpoint-*"))
    weights = load_file(path / "model.safetensors")
    expected = torch.bfloat16 if "bf16" in kind else torch.float32
    assert {one.dtype for one in weights.values()} == {expected}
    states = checkpoint.load_state(path)["optimizer"]["state"].values()
    is_small = [one["exp_avg_sq"].dtype == torch.uint8 for one in states]
    assert any(is_small) == ("8 bits" in kind)
    assert all(
        one["exp_avg"].dtype == torch.float32 for one in states if "exp_avg_scale" not in one
    )


def test_8_bits_on_two_processes_train_as_one(runs):
    """Rows keep their blocks, so the moments are the same, up to a tie in rounding."""
    one = runs / "8 bits/1"
    for other in ("2", "ddp", "2-1", "1-2"):
        assert_equal_runs(one, runs / "8 bits" / other, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "other"), [("bf16", "2"), ("8 bits, bf16", "2"), ("8 bits, bf16", "ddp")]
)
def test_bfloat16_on_two_processes(kind, other, runs):
    losses = [[row["loss"] for row in logged(runs / kind / name)] for name in ("1", other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", SHORT)
def test_other_ways_to_train(name, runs):
    if name.endswith("16"):
        assert_like_one_process(runs / name)
    else:
        assert_equal_runs(runs / name / "1", runs / name / "2", rtol=1e-3, atol=2e-4)


def test_the_result_has_the_type_of_its_base(runs):
    assert {one.dtype for one in final(runs / "bf16/1").values()} == {torch.float32}
    assert read_metrics(runs / "bf16/1/metrics.jsonl")


# Options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim adamw_8bit", "--optim adamw_8bit saves nothing here"),
        ("--pure_bf16", "--pure_bf16 needs --finetuning_type full"),
        ("--pure_bf16 --finetuning_type full --dtype float32", "--pure_bf16 contradicts --dtype f"),
        ("--pure_bf16 --finetuning_type full --fp16", "--pure_bf16 contradicts --dtype float16"),
        ("--optim lion", "--optim: minisft trains with AdamW: give adamw or adamw_8bit"),
    ],
)
def test_where_they_make_no_sense(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        training_options(*words.split())


@pytest.mark.parametrize(
    ("words", "optim"),
    [
        ("--optim adamw_torch", "adamw"),
        ("--optim adamw_bnb_8bit --finetuning_type full", "adamw_8bit"),
        ("--optim adamw_8bit --modules_to_save lm_head", "adamw_8bit"),
        ("--optim adamw_8bit --add_tokens <a>", "adamw_8bit"),
    ],
)
def test_names_of_the_optimizer(words, optim):
    assert training_options(*words.split()).optim == optim


def test_pure_bf16_computes_in_bfloat16():
    assert training_options(*as_flags(pure_bf16=True, finetuning_type="full")).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--pure_bf16 --finetuning_type full", "the base model, but {} without --pure_bf16"),
        ("--bf16", "the base model, but {} with --dtype float32"),
        ("--bf16 --finetuning_type full", "threads? each\n{} with --dtype float32"),
    ],
)
def test_advice_where_bfloat16_is_slow(words, advice):
    """It contradicts no flag, and promises no memory where the weights are float32."""
    options = training_options(*words.split())
    model, cpu = torch.nn.Linear(2, 2), torch.device("cpu")
    said = describe_training(options, model, torch.bfloat16, cpu, num_rows=3)
    assert re.search(f"{advice.format('this processor is faster')}$", said), said


def test_the_plan_names_both(capsys):
    options = training_options(*map(str, KINDS["8 bits, bf16"][2:]))
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    plan.print_model(options, model, Step(1, 1, torch.bfloat16, pure_bf16=True))
    said = capsys.readouterr().out
    assert "in full, weights and gradients in bfloat16, moments in 8 bits, bfloat16 on" in said
