"""Flags, recipes and the record of a run."""

import re
import tomllib

import pytest
import torch
from conftest import ROOT, command

import score
import train
from minisft.chat.options import parse_options as chat_options
from minisft.common import devices
from minisft.common.command_line import OptionParser
from minisft.common.devices import resolve_device, resolve_dtype
from minisft.common.errors import UserError
from minisft.common.flag_names import OTHER_NAMES
from minisft.common.model_flags import add_model_flags, add_template_flags, dtype_option
from minisft.common.outputs import check_output_dir, save_options
from minisft.common.script import run_script
from minisft.common.words import counted, duration
from minisft.evaluation.options import parse_choice_options as choice_options
from minisft.generation import assistant
from minisft.selection.select_options import parse_options as select_options
from minisft.training.options import parse_options as train_options


def new_parser():
    parser = OptionParser()
    add, switch = add_model_flags(parser)
    add("--lora_rank", type=int, default=8, help="rank")
    add("--learning_rate", type=float, help="peak")
    add("--names", default="a", help="a list")
    switch("--plot_loss", "draw")
    return parser


MODEL = ["--model_name_or_path", "m"]
NEEDED = [*MODEL, "--dataset", "d", "--output_dir", "o"]


def test_hyphens_and_switches():
    options = new_parser().parse_options(
        ["--model-name-or-path", "some-model", "--lora-rank=4", "--plot-loss"]
    )
    assert options.model_name_or_path == "some-model"
    assert options.lora_rank == 4 and options.plot_loss is True
    assert new_parser().parse_options([*MODEL, "--plot_loss", "False"]).plot_loss is False


def test_recipe_and_command_line(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model_name_or_path = "m"\nlora-rank = 16\nlearning_rate = 1e-3\n'
        'plot_loss = true\nnames = ["x", "y"]\ndtype = "bfloat16"\n'
    )
    options = new_parser().parse_options(["--config", str(recipe), "--lora_rank", "2"])
    assert (options.lora_rank, options.learning_rate, options.plot_loss) == (2, 1e-3, True)
    assert options.names == "x,y" and options.model_name_or_path == "m"


def test_line_breaks_of_a_system_prompt(capsys, monkeypatch, tmp_path):
    r"""A spelled \\n is a line break, on the command line and in recipes; rank 0 says so."""
    parser, flag = OptionParser(), "default_system"
    add, _ = parser.section("template")
    add_template_flags(add, auto="the model's")
    (tmp_path / "recipe.toml").write_text(f"{flag} = 'Be\\nkind.'\n")
    note = rf"--{flag}: the text is one line; each \n in it becomes a line break"
    for words in ([f"--{flag}", r"Be\nkind."], ["--config", str(tmp_path / "recipe.toml")]):
        assert vars(parser.parse_options(words))[flag] == "Be\nkind."
        assert capsys.readouterr().err == note + "\n"
    several = "C:\\new\nis several lines"
    assert vars(parser.parse_options([f"--{flag}", several]))[flag] == several
    monkeypatch.setenv("RANK", "1")
    parser.parse_options([f"--{flag}", r"Be\nkind."])
    assert capsys.readouterr().err == ""


def test_numbers_that_json_does_not_have():
    parser = OptionParser()
    add_template_flags(parser.section("template")[0], auto="the model's")
    with pytest.raises(UserError, match="--template_kwargs: .* NaN is not a number in JSON"):
        parser.parse_options(["--template_kwargs", '{"depth": NaN}'])


def test_home_folder_in_recipes_and_after_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model_name_or_path = "~/m"\nnames = "a~/b"\n')
    options = new_parser().parse_options(["--config", str(recipe)])
    assert (options.model_name_or_path, options.names) == ("/home/someone/m", "a~/b")
    assert new_parser().parse_options(["--model_name_or_path=~/n"]).model_name_or_path == (
        "/home/someone/n"
    )


def test_names_of_other_tools_lead_to_existing_flags():
    flags, scripts = set(), ("train", "score", "select", "export", "chat")
    for script in scripts:
        flags |= set(re.findall(r"--(\w+)", command("--help", script=f"{script}.py").stdout))
    flags |= set(re.findall(r"--(\w+)", command("ceval", "--help", script="eval.py").stdout))
    assert set(OTHER_NAMES) <= flags
    theirs = [name for names in OTHER_NAMES.values() for name in names.split()]
    assert "num_epochs" in theirs and not {"lora_rank", "seed"} & set(theirs)


def test_a_quantity_has_one_name_in_all_scripts():
    """Flags with the same help are the same flag."""
    names: dict[str, set[str]] = {}
    calls = [[f"{name}.py"] for name in ("train", "score", "select", "export", "chat")]
    calls += [["eval.py", "ceval"], ["eval.py", "compare"]]
    flag = re.compile(
        r"^  --(\w+)(?: (?:\{[^}]*\}|\S+))? *\n? {3,}(.*(?:\n {20,}.*)*)", re.MULTILINE
    )
    for script, *words in calls:
        found = flag.findall(command(*words, "--help", script=script).stdout)
        assert len(found) > 15, script
        for name, text in found:
            meaning = " ".join(re.sub(r"\((default|required).*", "", text, flags=re.DOTALL).split())
            names.setdefault(meaning.removeprefix("* "), set()).add(name)
    assert {"default_system"} in names.values() and {"seed"} in names.values()
    assert [others for others in names.values() if len(others) > 1] == []


def test_given_flags_are_known_also_at_their_default(tmp_path):
    parser, recipe = new_parser(), tmp_path / "recipe.toml"
    recipe.write_text('model_name_or_path = "m"\nnames = "a"\nplot_loss = true\n')
    assert parser.given(parser.parse_options([*MODEL, "--lora_rank", "8"])) == {
        "model_name_or_path",
        "lora_rank",
    }
    options = parser.parse_options(["--config", str(recipe)])
    assert parser.given(options) == {"config", "model_name_or_path", "names", "plot_loss"}
    options = parser.parse_options(["--config", str(recipe), "--plot_loss", "false"])
    assert "plot_loss" not in parser.given(options)
    options = parser.parse_options([*MODEL, "--lora_rank", "0", "--learning_rate", "0"])
    assert parser.given(options) == {"model_name_or_path", "lora_rank", "learning_rate"}


def test_a_flag_of_zero_that_has_no_effect_is_refused():
    words = [*MODEL, "--dataset", "d", "--output_dir", "o"]
    with pytest.raises(UserError, match="--lora_dropout belongs to --finetuning_type lora"):
        train_options([*words, "--finetuning_type", "full", "--lora_dropout", "0"])
    with pytest.raises(UserError, match="--seed .* needs --n_times"):
        choice_options("ceval", [*MODEL, "--data_dir", "d", "--output_dir", "o", "--seed", "0"])
    # No warm-up is what a constant schedule has.
    train_options([*words, "--lr_scheduler_type", "constant", "--warmup_steps", "0"])


TRAIN = [*MODEL, "--dataset", "d", "--output_dir", "o"]
SELECT = ["--dataset", "d", "--output", "o.json", "--sample_rate", "0.5", "--seed", "3"]


@pytest.mark.parametrize(
    "parse, words, lines",
    [
        (train_options, "--max_steps 5 --num_train_epochs 3", ["num_train_epochs"]),
        (train_options, "--max_steps -1 --num_train_epochs 3", []),
        (train_options, "--warmup_ratio 0.1 --warmup_steps 0", ["warmup_ratio"]),
        (train_options, "--warmup_ratio 0.1", []),
        (train_options, "--run_name a", ["run_name"]),
        (train_options, "--run_name a --report_to tensorboard", []),
        (train_options, "--per_device_eval_batch_size 4", ["per_device_eval_batch_size"]),
        (train_options, "--per_device_eval_batch_size 4 --validation_split 0.1", []),
        (train_options, "--stage pt --template_date 2026-07-26", ["template_date"]),
        (train_options, "--template_date 2026-07-26", []),
        (
            train_options,
            "--dry_run --plot_loss --report_to tensorboard",
            ["plot_loss", "report_to"],
        ),
        (chat_options, "--greedy --temperature 0.3 --seed 4", ["seed", "temperature"]),
        (chat_options, "--temperature 0.3 --seed 4", []),
        (chat_options, "--web --greedy --temperature 0.3", []),
        (select_options, "--strategy ifd --scores s.jsonl", ["seed"]),
        (select_options, "--strategy random", []),
        (select_options, "--strategy cluster --embeddings e.embeddings.npy", []),
    ],
)
def test_flags_without_effect_are_named(parse, words, lines, capsys):
    base = {train_options: TRAIN, chat_options: MODEL, select_options: SELECT}[parse]
    parse([*base, *words.split()])
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" has no effect: ")[0] for line in said] == [f"--{n}" for n in lines]


def test_the_first_token_that_is_given_twice_is_named():
    """Always the first: sets of strings have another order in every process."""
    names = [f"<{name}>" for name in "hgfedcba"]
    tokens = ["--new_special_tokens", ",".join(names), "--add_tokens", ",".join(reversed(names))]
    with pytest.raises(UserError, match="^<h> is in --new_special_tokens and in --add_tokens"):
        train_options([*TRAIN, *tokens])


def test_counts_and_durations_in_words():
    assert [counted(number, "step") for number in (0, 1, 1200)] == [
        "0 steps",
        "1 step",
        "1,200 steps",
    ]
    assert [counted(number, "process", "processes") for number in (1, 2)] == [
        "1 process",
        "2 processes",
    ]
    assert [duration(seconds) for seconds in (0.6, 119, 120)] == [
        "1 second",
        "119 seconds",
        "2 minutes",
    ]


def test_a_record_has_given_only_what_is_not_a_default(tmp_path):
    parser = new_parser()
    options = parser.parse_options([*MODEL, "--learning_rate", "1", "--lora_rank", "8"])
    for name in ("options.toml", "copied.toml"):
        save_options(options, tmp_path / name)
        again = parser.parse_options(["--config", str(tmp_path / name), "--names", "a"])
        assert parser.given(again) == {"config", "model_name_or_path", "learning_rate", "names"}


def test_all_unknown_names_are_reported_at_once(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("lora_rnk = 4\nsomething = 1\nlora_rank = 2\n")
    with pytest.raises(UserError) as caught:
        new_parser().parse_options(["--config", str(recipe), "--do_sing", "--lr=3", "--names", "x"])
    assert str(caught.value) == (
        f"no such flag: --do_sing, --lr (did you mean --learning_rate?); {recipe}: no such "
        "option: lora_rnk (did you mean lora_rank?), something (see --help)"
    )
    with pytest.raises(UserError, match="--a, --b must be given"):
        parser = OptionParser()
        add, _ = parser.section("numbers")
        for name in ("--a", "--b"):
            add(name, required=True, help="a number")
        parser.parse_options([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk = 4", "no such option: lora_rnk .did you mean lora_rank"),
        ("load_in_4bit = true", "load_in_4bit .use --quantization_bit 4"),
        ('lora_rank = "many"', "lora_rank"),
        ('dtype = "float8"', "float32"),
        ("plot_loss = 5", "true nor false"),
        ("lora_rank = ", "TOML"),
        ("[method]\nlora_rank = 4", "no such option: method .a recipe has no sections."),
    ],
)
def test_bad_recipes(text, message, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=message):
        new_parser().parse_options([*MODEL, "--config", str(recipe)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--lora_rnk", "4"], "did you mean --lora_rank"),
        ([*MODEL, "--lora_r", "4"], "did you mean --lora_rank"),
        ([*MODEL, "--torch-dtype=bfloat16"], "did you mean --dtype"),
        ([*MODEL, "--do_sing"], "no such flag: --do_sing .see --help.$"),
        ([*MODEL, "--optim", "lion"], "--optim .minisft trains with AdamW."),
        ([*MODEL, "--deepspeed=ds.json"], "--deepspeed .in train.py: use --parallel fsdp."),
        ([*MODEL, "--do_train", "stray"], "do_train .train.py always trains"),
        ([*MODEL, "--ddp_timeout", "9", "stray"], "unexpected argument 'stray'"),
        ([*MODEL, "--do_train", "--names", "x", "y"], "'y' after --names x: separate names by"),
        ([*MODEL, "--do_train", "--names=x", "y"], "'y' after --names=x: separate names by"),
        ([*MODEL, "--lora_rank", "2", "3"], "unexpected argument '3': flags begin with --"),
        ([*MODEL, "--lora_rank", "many"], "many"),
        ([*MODEL, "--dtype", "float8"], "float8"),
        ([*MODEL, "stray"], "stray"),
        ([], "--model_name_or_path"),
    ],
)
def test_bad_command_lines(arguments, message):
    with pytest.raises(UserError, match=message):
        new_parser().parse_options(arguments)


def test_help_shows_defaults_of_zero():
    parser = new_parser()
    add, switch = parser.section("more")
    add("--weight_decay", type=float, default=0.0, help="decay")
    switch("--packing", "pack")
    shown = parser.format_help()
    assert "decay (default: 0.0)" in shown and "(default: False)" not in shown


def test_minus_one_step_means_epochs():
    assert train_options([*NEEDED, "--max_steps", "-1", "--report_to", "none"]).max_steps is None


def test_looking_needs_no_output_folder():
    words = ["--model_name_or_path", "m", "--dataset", "d"]
    assert train_options([*words, "--dry_run", "--show_samples", "2"]).output_dir is None
    look = "--output_dir must be given; to look at the data only, add --dry_run"
    with pytest.raises(UserError, match=look):
        train_options([*words, "--show_samples", "3"])
    with pytest.raises(UserError, match="must be given; an adapter, given with --adapter, names"):
        train_options(["--dry_run", *words[2:]])


def test_record_repeats_the_run(tmp_path):
    arguments = [*MODEL, "--names", 'quoted "words", 中文 \\ back', "--learning_rate", "3e-5"]
    options = new_parser().parse_options(arguments)
    save_options(options, tmp_path / "options.toml")
    again = new_parser().parse_options(["--config", str(tmp_path / "options.toml")])
    assert {**vars(again), "config": None} == vars(options)
    assert tomllib.loads((tmp_path / "options.toml").read_text())["learning_rate"] == 3e-5


@pytest.mark.parametrize(
    ("capabilities", "products", "answers"),
    [
        ({"avx2": True}, False, False),
        ({"avx512_f": True, "avx512_bf16": False}, False, False),
        ({}, False, False),
        ({"avx512_bf16": True}, True, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9755"}, True, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False, True),
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True, True),
        ({"bf16": True}, True, True),
    ],
)
def test_which_processors_are_faster_in_bfloat16(capabilities, products, answers, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(devices, "has_fast_bfloat16", devices.has_fast_bfloat16.real)
    cpu = torch.device("cpu")
    assert devices.has_fast_bfloat16(cpu) == products
    found = devices.type_for_answers.real(cpu)
    assert found == (torch.bfloat16 if answers else torch.float32)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True)])
def test_which_gpus_multiply_bfloat16(capability, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.has_fast_bfloat16.real(torch.device("cuda")) == native


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("answers", ["float32", "bfloat16"])
def test_what_auto_chooses(products, answers, checkpoint, rows_file, tmp_path, here, monkeypatch):
    """The choice in training and scoring, and in chat, on any processor."""
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: products == "bfloat16")
    for_answers = getattr(torch, answers)
    monkeypatch.setattr(assistant, "type_for_answers", lambda device: for_answers)
    model = ["--model_name_or_path", checkpoint, "--device", "cpu", "--dataset", rows_file]
    printed = here(
        train,
        *model,
        template="plain",
        max_steps=1,
        output_dir=tmp_path / "out",
        dataloader_num_workers=0,
    )
    assert f" cpu, {products}, 1 process" in printed
    assert f" cpu, {products}, 1 process" in here(
        score, *model, "--template", "alpaca", "--output", tmp_path / "scores.jsonl"
    )
    loaded = assistant.Assistant(checkpoint, template="plain", device="cpu")
    assert loaded.dtype == loaded.model.model.norm.weight.dtype == for_answers


@pytest.mark.parametrize("torchrun", [None, 1], ids=["forked", "torchrun"])
def test_the_suite_computes_in_float32(torchrun, tmp_path):
    """Python imports tests/startup/sitecustomize.py first, however a script is started."""
    script = tmp_path / "type.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch; from minisft.common.devices import resolve_dtype\n"
        "print(resolve_dtype('auto', torch.device('cpu')))\n"
    )
    done = command(script=script, torchrun=torchrun)
    assert done.stdout == "torch.float32\n", done.stdout + done.stderr


def test_types_and_devices(monkeypatch):
    def resolved(*arguments, native=False):
        monkeypatch.setattr("minisft.common.devices.has_fast_bfloat16", lambda device: native)
        options = new_parser().parse_options([*MODEL, *arguments])
        return resolve_dtype(dtype_option(options), torch.device("cpu"))

    assert resolved() == torch.float32 and resolved(native=True) == torch.bfloat16
    assert resolved("--bf16") == torch.bfloat16 and resolved("--fp16") == torch.float16
    assert resolved("--dtype", "float16", native=True) == torch.float16
    for arguments in (["--bf16", "--fp16"], ["--fp16", "--dtype", "float32"]):
        with pytest.raises(UserError, match="contradicts"):
            resolved(*arguments)
    for name in (
        "cuda:77",
        "cuda:zz",
        "cuda:",
        "cuda:-1",
        "cuda:200",
        "cuda:01",
        "cpu:3",
        "gpu",
        "mps:1",
        "",
    ):
        options = new_parser().parse_options([*MODEL, f"--device={name}"])
        with pytest.raises(UserError, match=f"--device {name}: "):
            resolve_device(options.device)
        if name == "cuda:77":
            assert resolve_device(options.device, must_exist=False) == torch.device(name)
        else:
            with pytest.raises(UserError, match="no such device. Use cpu, mps, cuda or cuda:N."):
                resolve_device(options.device, must_exist=False)


def test_output_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert check_output_dir(tmp_path / "new", False) == tmp_path / "new"
    check_output_dir(tmp_path / "full", True)
    for path, overwrite, inputs in (
        ("full", False, []),
        ("full/file", True, []),
        ("full", True, [tmp_path / "full"]),
    ):
        with pytest.raises(UserError, match="--output_dir"):
            check_output_dir(tmp_path / path, overwrite, *inputs)


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("rows.json: empty"), 2, "error: rows.json: empty\n"),
        (UserError("a\nb\x1b[2J \ud83d 中文"), 2, r"error: a\nb\x1b[2J \ud83d 中文" + "\n"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "error: x.json: No such file\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (MemoryError(), 2, "error: out of memory: use smaller batches or a smaller model\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_user_errors_take_one_line(error, status, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(failing(error))
    assert (ended.value.code, capsys.readouterr().err) == (status, said)


def test_a_bug_shows_its_traceback(capsys, monkeypatch):
    """A user mistake shows it only with --debug."""
    for error, status, words in ((ZeroDivisionError(), 1, []), (UserError(), 2, ["--debug"])):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        with pytest.raises(SystemExit) as ended:
            run_script(failing(error))
        shown = capsys.readouterr().err
        assert ended.value.code == status and shown.startswith("Traceback")
        assert "in main" in shown


def test_out_of_memory_takes_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: torch.empty(2**60))
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory: ")


def test_long_messages_keep_both_ends():
    text = str(UserError("config.json: " + "x" * 10**6 + " is no number"))
    assert len(text) < 2100 and text.startswith("config.json: x") and text.endswith("is no number")
