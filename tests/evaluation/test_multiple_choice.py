"""Multiple choice: scores equal lm-evaluation-harness on real files; reading these files."""

import copy
import itertools
import json
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from minisft.checkpoints.folders import load_model
from minisft.common.errors import UserError
from minisft.evaluation.benchmark_files import language_note, read_subjects
from minisft.evaluation.benchmarks import BENCHMARKS, LETTERS, Question, Subject
from minisft.evaluation.choice_prompts import (
    PromptBuilder,
    choose_demonstrations,
    shared_prefix_length,
)
from minisft.evaluation.multiple_choice import answer_subject, log_likelihoods
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

SAMPLES = 4
FILES = {  # benchmark: a subject, its rows, its demonstrations, and how the harness asks
    "ceval": ("law", "val/law_val.csv", "dev/law_dev.csv", "question", "answer", ""),
    "cmmlu": ("anatomy", "test/anatomy.csv", "dev/anatomy.csv", "Question", "Answer", ""),
    "mmlu": ("anatomy", "val/anatomy_val.csv", "dev/anatomy_dev.csv", "question", "answer", " "),
}


def small_model(folder, tokenizer_dir, vocab_size, **settings):
    """A random Llama with a real tokenizer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, folder / name)
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 4096,
        "vocab_size": vocab_size,
        **settings,
    }
    kind = transformers.MistralConfig if "sliding_window" in settings else transformers.LlamaConfig
    model = transformers.AutoModelForCausalLM.from_config(kind(**config))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama2_dir(shared_data, tmp_path_factory):
    return small_model(
        tmp_path_factory.mktemp("models") / "llama2",
        shared_data / "tokenizers" / "TinyLlama-1.1B-Chat-v0.6",
        32000,
    )


def harness(shared_data, llama2_dir, folder):
    """The scores of lm-evaluation-harness, from task files that describe the prompts to it."""
    from lm_eval_oracle import log_likelihoods as found_by_harness

    (folder / "tasks").mkdir()
    headings = {
        "ceval": "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n",
        "cmmlu": "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n",
        "mmlu": "The following are multiple choice questions (with answers) about anatomy.\n\n",
    }
    endings = {"ceval": "答案：", "cmmlu": "答案是：", "mmlu": "Answer:"}
    for name, (_, rows, shown, question, answer, delimiter) in FILES.items():
        files = {
            "dev": str(shared_data / "eval" / name / shown),
            "rows": str(shared_data / "eval" / name / rows),
        }
        header = {"names": [question, *LETTERS, answer], "header": None} if name == "mmlu" else {}
        task = {
            "task": name,
            "dataset_path": "csv",
            "test_split": "rows",
            "fewshot_split": "dev",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache"), **header},
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "description": headings[name],
            "doc_to_target": answer,
            "doc_to_choice": list(LETTERS),
            "doc_to_text": "题目：" * (name == "cmmlu") + "{{" + question + ".strip()}}\nA. {{A}}\n"
            "B. {{B}}\nC. {{C}}\nD. {{D}}\n" + endings[name],
            "target_delimiter": delimiter,
        }
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML too
    return found_by_harness(llama2_dir, folder / "tasks", (0, 5), 4096, SAMPLES)


def first_questions(shared_data, name, num_fewshot, count=SAMPLES):
    key, rows, *_ = FILES[name]
    (subject,) = read_subjects(
        BENCHMARKS[name], shared_data / "eval" / name, rows.split("/")[0], num_fewshot, [key]
    )
    return replace(subject, questions=subject.questions[:count])


def test_log_likelihoods_equal_lm_evaluation_harness(shared_data, llama2_dir, tmp_path):
    theirs, model = harness(shared_data, llama2_dir, tmp_path), load_model(llama2_dir)
    for name, num_fewshot in itertools.product(FILES, (0, 5)):
        subject = first_questions(shared_data, name, num_fewshot)
        builder = PromptBuilder(BENCHMARKS[name], Tokenizer.load(llama2_dir), max_length=4096)
        rows = answer_subject(model, builder, subject, num_fewshot, batch_size=3)
        ours = torch.tensor([row.log_likelihoods for row in rows])
        assert ours.shape == (SAMPLES, 4) and {row.num_fewshot for row in rows} == {num_fewshot}
        torch.testing.assert_close(
            ours,
            torch.tensor(theirs[name][num_fewshot]),
            rtol=0,
            atol=1e-4,
            msg=lambda text, at=(name, num_fewshot): f"{at}: {text}",
        )


def alone(model, ids, option):
    """log P(option | ids) by transformers, from a single pass over the text, without its end."""
    # A copy, because dynamic angles stay those of the longest text that a model has seen.
    logits = copy.deepcopy(model)(torch.tensor([(ids + option)[:-1]])).logits[0].log_softmax(-1)
    return sum(logits[len(ids) - 1 + place, id].item() for place, id in enumerate(option))


@pytest.mark.parametrize("template_name", [None, "chatml", "alpaca"])
def test_a_row_of_questions_scores_each_as_if_alone(tmp_path, tiny_tokenizer_dir, template_name):
    folder = small_model(tmp_path / "model", tiny_tokenizer_dir, 300)
    tokenizer = Tokenizer.load(folder)
    template = template_name and get_template(template_name, tokenizer)
    questions = [
        Question(str(number), "the cat " * (1 + 3 * number), ("a", "b 猫", "", "d"), "B")
        for number in range(5)
    ]
    subject = Subject("cats", "cats", "", questions[1:], questions[:1])
    builder = PromptBuilder(BENCHMARKS["ceval"], tokenizer, template)
    made = [builder.build(subject, subject.demonstrations, one) for one in subject.questions]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = [[alone(oracle, one.ids, option) for option in one.options] for one in made]
    for batch_size in (1, 3, 8):
        found = log_likelihoods(load_model(folder), made, batch_size)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)
    if template:  # the letter has the position at which the model learned to write it
        message = {
            "role": "user",
            "content": BENCHMARKS["ceval"].heading.format(subject="cats")
            + BENCHMARKS["ceval"].ask(questions[1]),
        }
        one = builder.build(subject, [], questions[1])
        assert one.ids == template.encode_prompt([message])
        whole = template.encode([message, {"role": "assistant", "content": "C"}])[0].ids
        assert whole[: len(one.ids) + 1] == one.ids + one.options[2]


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 16.0}


@pytest.mark.parametrize(
    "fields",
    [{"sliding_window": 96}, {"max_position_embeddings": 64, "rope_parameters": DYNAMIC}],
)
def test_options_of_several_tokens_in_a_window_or_with_dynamic_angles(
    tmp_path, shared_data, fields
):
    stories = shared_data / "models" / "stories260K"
    folder = small_model(tmp_path / "model", stories, 512, **fields)
    subject = first_questions(shared_data, "mmlu", 1, 3)
    builder = PromptBuilder(BENCHMARKS["mmlu"], Tokenizer.load(folder))
    made = [builder.build(subject, subject.demonstrations[:1], one) for one in subject.questions]
    assert {len(option) for option in made[0].options} == {1, 2}
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = [[alone(oracle, one.ids, option) for option in one.options] for one in made]
    found = log_likelihoods(load_model(folder), made)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)


def test_the_token_of_a_letter_is_the_token_after_the_prompt(llama2_dir):
    tokenizer = Tokenizer.load(llama2_dir)
    subject = Subject("law", "法学", "", [Question("0", "一", ("a", "b", "c", "d"), "A")])
    prompt = PromptBuilder(BENCHMARKS["ceval"], tokenizer).build(subject, [], subject.questions[0])
    assert prompt.options[0] == [29909] and tokenizer.encode("A") == [319]
    assert tokenizer.decode(prompt.ids) == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
        "一\nA. a\nB. b\nC. c\nD. d\n答案："
    )


def test_a_tokenizer_without_letters_is_refused():
    known = {"A": 1, "B": 2}
    for letters in ({}, known, {**known, "C": 3}):
        tokenizer = SimpleNamespace(
            add_bos_token=False,
            bos_token_id=None,
            encode=lambda text, ids=letters: [ids.get(one, 0) for one in text],
        )
        question = Question("0", "一", ("a", "b", "c", "d"), "A")
        builder = PromptBuilder(BENCHMARKS["ceval"], tokenizer)
        if len(letters) == 3:  # a single unknown letter still differs from the others
            assert builder.build(Subject("", "", "", []), [], question).options == [
                [1],
                [2],
                [3],
                [0],
            ]
            continue
        with pytest.raises(UserError, match="some of the letters A, B, C and D the same tokens"):
            builder.build(Subject("", "", "", []), [], question)


def test_demonstrations_that_do_not_fit_are_dropped(tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    questions = [
        Question(str(number), "the cat " * 5, ("a", "b", "c", "d"), "B") for number in range(4)
    ]
    subject = Subject("cats", "cats", "", questions, questions)
    whole = PromptBuilder(BENCHMARKS["mmlu"], tokenizer).build(subject, questions[:3], questions[3])
    room = PromptBuilder(BENCHMARKS["mmlu"], tokenizer, max_length=len(whole.ids) + 1)
    assert room.build(subject, questions[:3], questions[3]).num_fewshot == 3
    room.max_length = len(whole.ids) - 1
    fitted = room.build(subject, questions[:3], questions[3])
    assert (fitted.num_fewshot, fitted.is_cut) == (2, False)
    room.max_length = 20
    cut = room.build(subject, questions[:3], questions[3])
    assert (cut.num_fewshot, cut.is_cut, cut.ids[0]) == (0, True, tokenizer.bos_token_id)
    assert len(cut.ids) + max(map(len, cut.options)) - 1 == 20
    assert cut.ids[1:] == whole.ids[-(len(cut.ids) - 1) :]


def test_repetitions_have_different_demonstrations():
    shown = [Question(str(number), "", ("",) * 4, "A") for number in range(8)]
    subject = Subject("law", "law", "", [], shown)
    assert choose_demonstrations(subject, 5) == shown[:5]
    drawn = [choose_demonstrations(subject, 5, run, seed=7) for run in (1, 2)]
    assert drawn[0] != drawn[1] != shown[:5]
    assert drawn[0] == choose_demonstrations(subject, 5, 1, seed=7)
    assert all(len({one.id for one in some}) == 5 for some in drawn)


def test_shared_prefix_length():
    assert shared_prefix_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert shared_prefix_length([[1, 9], [2, 9], [1, 9]]) == 0
    assert shared_prefix_length([[], []]) == 0


HEADERS = {
    "ceval": "id,question,A,B,C,D,answer,explanation\n3,Q,a,b,c,d,B,why\n",
    "cmmlu": ",Question,A,B,C,D,Answer\n3,Q,a,b,c,d,B\n",
    "mmlu": "Q,a,b,c,d,B\n",
}


def data_folder(tmp_path, content, name="law", mapping='{"law": ["Law", "法学", "Humanities"]}'):
    folder = tmp_path / "data"
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{name}_{split}.csv").write_text(content, encoding="utf-8")
    (folder / "subject_mapping.json").write_text(mapping, encoding="utf-8")
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(HEADERS))
def test_headers_mappings_and_zips(tmp_path, name, packed):
    folder = data_folder(tmp_path, "\ufeff" + HEADERS[name])
    if packed:
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for path in folder.rglob("*.*"):
                archive.write(path, "inside/" + path.relative_to(folder).as_posix())
            archive.writestr("__MACOSX/test/._law_test.csv", "junk")
        folder = tmp_path / "data.zip"
    (subject,) = read_subjects(BENCHMARKS[name], folder, "test", num_fewshot=1)
    number = "0" if name == "mmlu" else "3"
    assert subject.questions == [Question(number, "Q", ("a", "b", "c", "d"), "B")]
    assert (subject.name, subject.group) == ("法学", "Humanities")
    assert subject.demonstrations == subject.questions
    assert len(read_subjects(BENCHMARKS[name], folder, "test", 0, ["law", "law"])) == 1


def test_a_damaged_zip_is_named(tmp_path):
    folder = data_folder(tmp_path, HEADERS["ceval"] * 200)
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for one in sorted(folder.rglob("*.*")):
            archive.write(one, one.relative_to(folder).as_posix())
    whole = path.read_bytes()
    place = whole.index(b"val/law_val.csv") + 30
    encrypted = bytearray(whole)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := encrypted.find(mark, at + 1)) >= 0:
            encrypted[at + offset] |= 1
    for content in (whole[:place] + bytes(30) + whole[place + 30 :], encrypted):
        path.write_bytes(content)
        with pytest.raises(UserError, match="data.zip.*Download the zip again"):
            read_subjects(BENCHMARKS["ceval"], path, "val")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        read_subjects(BENCHMARKS["ceval"], path, "val")


def test_secret_answers_and_ids_that_are_not_unique(tmp_path):
    rows = "id,question,A,B,C,D,answer\n7,Q,a,b,c,d,\n7,R,a,b,c,d,\n"
    (subject,) = read_subjects(BENCHMARKS["ceval"], data_folder(tmp_path, rows), "test")
    assert [one.answer for one in subject.questions] == [None, None]
    assert [one.id for one in subject.questions] == ["0", "1"]
    with pytest.raises(UserError, match="law_dev.csv: has no answers"):
        read_subjects(BENCHMARKS["ceval"], tmp_path / "data", "test", 1)


@pytest.mark.parametrize(
    "content, said",
    [
        ("id,question,A,B,C,answer\n0,Q,a,b,c,B\n", "column d is missing"),
        ("id,question,A,B,C,D,answer\n0,Q,a,b,c,d,E\n", "line 2: the answer is 'E'"),
        (
            "id,question,A,B,C,D,answer\n0,Q,a,b,c,d,A\n1,Q,a,b,c,d,\n",
            "line 3: the answer is missing",
        ),
        (
            "id,question,A,B,C,D,answer\n0,Q,a,b,c,d\n",
            "line 2: 6 columns, but the first row has 7",
        ),
        ("id,question,A,B,C,D,answer\n", "no questions"),
        ("", "no questions"),
        ("a,b\n", "but found 2 columns"),
        ("Q,a,b,c,d\n", "has no answers"),
        ('Q,"a,b,c,d,B\n', "line"),
    ],
)
def test_bad_files_are_named(tmp_path, content, said):
    folder = data_folder(tmp_path, content)
    with pytest.raises(UserError, match=said) as error:
        read_subjects(BENCHMARKS["ceval"], folder, "val", 2)
    assert "law_" in str(error.value)


def test_missing_subjects_and_names_are_reported(tmp_path):
    folder, ceval = data_folder(tmp_path, HEADERS["ceval"]), BENCHMARKS["ceval"]
    with pytest.raises(UserError, match="no CSV files in a folder 'train'.*dev, test, val"):
        read_subjects(ceval, folder, "train")
    with pytest.raises(UserError, match="law has 1 demonstrations, not 5. Use --num_fewshot 1"):
        read_subjects(ceval, folder, "val", 5)
    with pytest.raises(UserError, match="--subjects art.*law"):
        read_subjects(ceval, folder, "val", 0, ["art"])
    (folder / "dev" / "law_dev.csv").unlink()
    with pytest.raises(UserError, match="law has no demonstrations"):
        read_subjects(ceval, folder, "val", 1)
    for wrong in ("[]", '{"law": ["Law"]}', '{"law": {"name": 3, "category": null}}', "[" * 9999):
        (folder / "subject_mapping.json").write_text(wrong)
        with pytest.raises(UserError, match="subject_mapping.json: expected"):
            read_subjects(ceval, folder, "val", 0)
    (folder / "subject_mapping.json").unlink()
    with pytest.raises(UserError, match="does not name the subject law"):
        read_subjects(ceval, folder, "val", 0)
    assert read_subjects(BENCHMARKS["mmlu"], folder, "val", 0)[0].name == "law"
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        read_subjects(ceval, folder / "val" / "law_val.csv", "val")


def test_questions_of_another_benchmark_are_noticed(shared_data):
    for name, split in (("ceval", "val"), ("cmmlu", "test"), ("mmlu", "val")):
        subjects = read_subjects(BENCHMARKS[name], shared_data / "eval" / name, split)
        noticed = {other for other in BENCHMARKS if language_note(BENCHMARKS[other], subjects)}
        assert noticed == ({"ceval", "cmmlu"} if name == "mmlu" else {"mmlu"})
    assert "the folder of C-Eval?" in language_note(BENCHMARKS["ceval"], subjects)
    word = replace(subjects[0].questions[0], text="What does 你好 mean?")
    asks_about_a_word = replace(subjects[0], questions=[word, *subjects[0].questions])
    assert language_note(BENCHMARKS["mmlu"], [asks_about_a_word, *subjects[1:]]) == ""
