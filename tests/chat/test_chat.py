"""chat.py as people and shells use it: key presses in a terminal, pipes, exit statuses."""

import contextlib
import json
import os
import pty
import re
import readline
import select
import shutil
import signal
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command
from forks import Forked, run_script
from full_disk import file_size_limit
from standing import HANG_SECONDS, lines_in, standing_still, state_of, wait_until

from minisft.chat.options import parse_options, read_password
from minisft.chat.terminal import Conversation, converse, printable
from minisft.chat.transcript import Transcript
from minisft.common.errors import UserError
from minisft.generation.answer import Answer
from minisft.generation.context import Context
from minisft.generation.sampling import Sampling
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

SCRIPT = ROOT / "chat.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "LC_ALL": "C.UTF-8"}
PROMPT = "\033[1;32m>\033[0m "
ENTERED = "\r\n\033[?2004l\r"  # a line has been read; pasted text is no longer marked
GREEDY = ["--dtype", "float32", "--device", "cpu", "--greedy"]
TOKEN = "minisft.model.decoder:CausalLM.logits"  # called for every token of an answer


def chat(model_dir, *flags, input=""):
    """Run chat.py to its end with `input` in a file -> (exit status, stdout, stderr)."""
    words = ["--model_name_or_path", model_dir, *flags]
    # The model's own line ends stay in the output.
    done = run_script("chat.py", words, input=input, newline="")
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def oracle(tiny_chat_model_dir):
    """A function: messages -> transformers' greedy answer of 20 tokens."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir)
    tokenizer = Tokenizer.load(tiny_chat_model_dir)
    template = get_template("auto", tokenizer)

    def answer(messages):
        ids = torch.tensor([template.encode_prompt(messages)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            pad_token_id=0,
            eos_token_id=sorted(template.stop_token_ids([1, 3])),
        )
        return tokenizer.decode(output[0, ids.shape[1] :].tolist())

    answer.fit = Context(template, max_length=150).fit
    return answer


def user(text):
    return {"role": "user", "content": text}


def test_one_question_prints_the_answer_only(tiny_chat_model_dir, oracle):
    flags = [*GREEDY, "--max-new-tokens", "20", "--default_system", "简洁"]
    expected = oracle([{"role": "system", "content": "简洁"}, user("the cat 你好")])
    status, answer, _ = chat(tiny_chat_model_dir, *flags, "--prompt", "the cat 你好", input="no")
    assert (status, answer) == (0, expected + "\n")
    status, answer, _ = chat(
        tiny_chat_model_dir, *flags, "--prompt", "-", input="\ufeffthe cat 你好"
    )  # some editors begin a file like this
    assert (status, answer) == (0, expected + "\n")


def test_conversation_through_a_pipe(tiny_chat_model_dir, oracle, tmp_path):
    saved, other = tmp_path / "saved.json", tmp_path / "other.json"
    other.write_text("precious")
    lines = [
        "the cat",
        "",
        "/system be brief",
        "你好 🙂",
        f"/save {saved}",
        f"/save {other}",
        "/etc/hosts is missing",
        f"/save {saved}",
        "/clear",
        "the cat",
        "/nonsense",
        "/save",
        f"/save {tmp_path}/no/folder",
        "/system",
        "/?",
        "the mat",
        "/quit",
        "never read",
    ]
    flags = [*GREEDY, "--max_new_tokens", "20"]
    status, printed, said = chat(tiny_chat_model_dir, *flags, input="\n".join(lines))
    system, messages = {"role": "system", "content": "be brief"}, [user("the cat")]
    answers = [oracle(messages)]
    for question in ("你好 🙂", "/etc/hosts is missing"):
        messages += [{"role": "assistant", "content": answers[-1]}, user(question)]
        answers.append(oracle([system, *messages]))
    again = [user("the cat")]
    answers.append(oracle([system, *again]))
    again += [{"role": "assistant", "content": answers[-1]}, user("the mat")]
    answers.append(oracle(again))
    assert (status, printed) == (2, "".join(answer + "\n" for answer in answers))
    messages.append({"role": "assistant", "content": answers[2]})
    assert json.loads(saved.read_text("utf-8")) == [{"messages": [system, *messages]}]
    assert other.read_text() == "precious" and f"error: {other} exists" in said
    for part in (
        "(6 messages saved",
        "(conversation cleared)",
        "error: /nonsense is not a command",
        "error: /save needs",
        "no/folder",
        "(system prompt removed)",
        "/save FILE",
    ):
        assert part in said
    assert "\033" not in said


def test_a_full_disk_leaves_the_saved_conversation(tmp_path):
    conversation = Conversation(None, Sampling())
    conversation.turns = [user("the cat"), {"role": "assistant", "content": "sat"}]
    conversation.save(str(tmp_path / "a.json"))
    before = (tmp_path / "a.json").read_bytes()
    for name in ("a.json", "b.json"):
        with file_size_limit(20), pytest.raises(UserError, match=f"{name}: could not be written"):
            conversation.save(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == before
    conversation.save(str(tmp_path / "b.json"))


def test_commands_as_people_type_them(tiny_chat_model_dir, oracle, tmp_path):
    """The wide space of Chinese input and a tab also separate a command from its argument."""
    lines = [
        f"\ufeff/save {tmp_path}/x",
        "/system　你是诗人",
        "/你好",
        "/SAVE x",
        f"  /save\t{tmp_path}/对话.json",
        "/save ~/chat.json",
        "/save ~/no/x",
        "/system",
        "the mat",
        "/quit now",
        "never",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        status, printed, said = chat(
            tiny_chat_model_dir, *GREEDY, "--max_new_tokens", "20", input="\n".join(lines)
        )
    messages = [{"role": "system", "content": "你是诗人"}, user("/你好")]
    messages.append({"role": "assistant", "content": oracle(messages)})
    answer = oracle([*messages[1:], user("the mat")])
    assert (status, printed) == (2, f"{messages[-1]['content']}\n{answer}\n")
    for name in ("对话.json", "chat.json"):
        assert json.loads((tmp_path / name).read_text("utf-8")) == [{"messages": messages}]
    reason = "could not be written: No such file or directory; choose another name"
    assert f"error: {tmp_path}/no/x: {reason}\n" in said
    assert "error: there is nothing to save yet" in said and "/SAVE is not a command" in said


def test_a_turn_without_an_answer_is_reported_and_dropped(tiny_chat_model_dir, tmp_path):
    for path in tiny_chat_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(300)]}))
    status, printed, said = chat(tmp_path, *GREEDY, input=f"the cat\n/save {tmp_path}/saved.json")
    assert (status, printed) == (2, "\n") and not (tmp_path / "saved.json").exists()
    assert "(no answer: the question is dropped)" in said and "nothing to save" in said


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_standard_output_or_error_that_is_closed(tiny_chat_model_dir, closed):
    words = [
        sys.executable,
        SCRIPT,
        "--model_name_or_path",
        tiny_chat_model_dir,
        "--prompt",
        "x",
        "--max_new_tokens",
        "2",
    ]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=HANG_SECONDS,
    )
    status = 2 if closed == ">&-" else 0  # the answer is lost
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert bool(done.stdout) == (closed == "2>&-")
    if status:
        assert done.stderr.startswith("error: standard output is closed")


def test_long_conversation_drops_turns_and_a_long_message_is_refused(tiny_chat_model_dir, oracle):
    flags = [
        *GREEDY,
        "--max_new_tokens",
        "20",
        "--max_length",
        "150",
        "--default_system",
        "be brief",
    ]
    lines = ["first question", "second question", "x" * 400, "third question", "fourth question"]
    status, printed, said = chat(tiny_chat_model_dir, *flags, input="\n".join(lines) + "\n")
    messages, first, answers = [{"role": "system", "content": "be brief"}], 0, []
    for question in lines[:2] + lines[3:]:
        messages.append(user(question))
        kept = oracle.fit(messages, 20)
        first = len(messages) - len(kept)
        answers.append(oracle(kept))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert first and (status, printed) == (2, "".join(answer + "\n" for answer in answers))
    assert f"(the conversation is longer than 150 tokens: the oldest {first} messages" in said
    assert said.count("error: the message with the system prompt is too long") == 1
    assert "the limit is 130 tokens (of 150" in said


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tempature", "1"], "did you mean --temperature"),
        (["--prompt", " "], "the question is empty"),
        (["--max_length", "1"], "--max_length must be at least 2"),
        (["--prompt", "x", "--max_length", "1000000"], "tokens at most, not 1000000"),
        (["--prompt", "x", "--top_p", "0"], "--top_p must be above 0"),
        (["--prompt", "a\x1b[2J"], "the message has the control character U+001B (character 2)"),
        (["--prompt", "x", "--web"], "--prompt and --web exclude each other"),
        (
            ["--prompt", "x", "--default_system", "y", "--identity", "z"],
            "--default_system and --identity exclude",
        ),
        (["--prompt", "x", "--identity", "/nowhere"], "--identity /nowhere: No such file"),
        (["--prompt", "x", "--identity", "/dev/null"], "--identity /dev/null: the file is empty"),
        (["--prompt", "x", "--log", "/nowhere/log"], "--log /nowhere/log: No such file"),
        (["--file", "x"], "--file needs --output"),
        (["--file", "x", "--output", "y", "--log", "z"], "--log is for conversations"),
        (["--file", "x", "--output", "y", "--compile"], "--compile is for conversations"),
        (["--compile", "--quantization_bit", "4"], "--compile contradicts --quantization_bit 4"),
        (["--output", "x"], "--output belongs to --file"),
        (["--compare_with", "none"], "--compare_with belongs to --web"),
        (["--web", "--server_port", "65536"], "--server_port must be at most 65535"),
        (["--web", "--password", ""], "--password is empty"),
        (["--prompt", "x", "--template", "nonsense"], "unknown template 'nonsense'"),
        (["--prompt", "x", "--adapter", "/nowhere"], "/nowhere"),
        (["--prompt", "x" * 300, "--max_length", "100"], "the limit is 50 tokens (of 100"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tiny_chat_model_dir, flags, said):
    status, printed, complaint = chat(tiny_chat_model_dir, *flags)
    assert (status, printed) == (2, "")
    assert complaint.startswith("error: ") and said in complaint and complaint.count("\n") == 1


def test_the_password_of_the_page(monkeypatch):
    """An empty one, as a script gives from a variable that is not set, opens no page."""
    needed = ["--web", "--model_name_or_path", "M"]
    read = lambda *flags: read_password(parse_options([*needed, *flags]))  # noqa: E731
    assert read() is None and read("--password", "secret") == "secret"
    monkeypatch.setenv("MINISFT_PASSWORD", "geheim")
    assert read() == "geheim" and read("--password", "secret") == "secret"
    monkeypatch.setenv("MINISFT_PASSWORD", "")
    assert read("--password", "secret") == "secret"
    with pytest.raises(UserError, match="MINISFT_PASSWORD is empty. For a page without a password"):
        read()


def test_identity_is_the_standing_instruction(tiny_chat_model_dir, oracle, tmp_path):
    (tmp_path / "identity.txt").write_text("你是小明。\nBe brief.\n\n", encoding="utf-8-sig")
    lines = ["the cat", "/system other", "/reset", "the mat", "/system", "/reset", "the rat"]
    status, printed, _ = chat(
        tiny_chat_model_dir,
        *GREEDY,
        "--max_new_tokens",
        "20",
        "--identity",
        tmp_path / "identity.txt",
        input="\n".join(lines),
    )
    answers = [
        oracle([{"role": "system", "content": system}, user(question)])
        for system, question in (
            ("你是小明。\nBe brief.", "the cat"),
            ("other", "the mat"),
            ("你是小明。\nBe brief.", "the rat"),
        )
    ]
    assert (status, printed) == (0, "".join(answer + "\n" for answer in answers))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    flags = ["--prompt", "x", "--identity", tmp_path / "latin.txt"]
    status, _, said = chat(tiny_chat_model_dir, *flags)
    assert status == 2 and "latin.txt: not UTF-8 text" in said


def test_an_empty_system_prompt_removes_that_of_the_training(tiny_chat_model_dir, oracle, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(tiny_chat_model_dir, folder)
    (folder / "options.toml").write_text('default_system = "Be brief."\n')
    trained = {"role": "system", "content": "Be brief."}
    kept, removed = oracle([trained, user("the cat")]), oracle([user("the cat")])
    assert kept != removed
    flags = [*GREEDY, "--max_new_tokens", "20", "--prompt", "the cat"]
    assert chat(folder, *flags)[:2] == (0, kept + "\n")
    assert chat(folder, *flags, "--default_system", "")[:2] == (0, removed + "\n")


@pytest.mark.parametrize("is_file", [True, False])
def test_line_breaks_that_are_spelled_out(is_file, tiny_chat_model_dir, oracle, tmp_path):
    r"""Only one line with \\n in it gets line breaks. Texts of several lines do not change."""
    path = tmp_path / "identity.txt"
    for text, meant in (
        (r"You are\n\nbrief.", "You are\n\nbrief."),
        ("Write\nC:\\new", "Write\nC:\\new"),
    ):
        path.write_text(text + "\n", encoding="utf-8")
        flags = ["--identity", path] if is_file else ["--default_system", text]
        flags += [*GREEDY, "--max_new_tokens", "20", "--prompt", "the cat"]
        status, printed, said = chat(tiny_chat_model_dir, *flags)
        answer = oracle([{"role": "system", "content": meant}, user("the cat")])
        assert (status, printed) == (0, answer + "\n")
        assert said.count(r"each \n in it becomes a line break") == (meant != text)
        assert (str(path) in said) == (is_file and meant != text)


def test_flags_that_the_template_does_not_read_are_named(tiny_chat_model_dir):
    kwargs = '{"date_string": "26 Jul 2024"}'
    flags = ["--enable_thinking", "true", "--template_kwargs", kwargs]
    _, _, said = chat(tiny_chat_model_dir, *GREEDY, *flags, "--prompt", "x")
    assert "--enable_thinking true has no effect: the template auto" in said
    assert "--template_kwargs date_string has no effect" in said


def test_an_identity_that_leaves_no_room_is_refused_at_the_start(tiny_chat_model_dir, tmp_path):
    identity, prompts = tmp_path / "long.txt", tmp_path / "prompts.txt"
    identity.write_text("be brief " * 30)
    prompts.write_text("the cat\n")
    template = get_template("auto", Tokenizer.load(tiny_chat_model_dir))
    messages = [{"role": "system", "content": identity.read_text().strip()}, user("x")]
    length = len(template.encode_prompt(messages))
    for flags in ([], ["--file", prompts, "--output", tmp_path / "answers.jsonl"], ["--web"]):
        done = command(
            "--model_name_or_path",
            tiny_chat_model_dir,
            "--max_length",
            100,
            *GREEDY,
            "--identity",
            identity,
            *flags,
            script="chat.py",
        )
        said = f"error: --identity {identity} is too long: {length} tokens with its template, "
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{said}the limit is 50 tokens (of 100, the rest")


def test_ctrl_c_ends_a_conversation_through_a_pipe(tiny_chat_model_dir, tmp_path):
    told = tmp_path / "told"
    words = [
        sys.executable,
        *standing_still(TOKEN, [10], told),
        SCRIPT,
        "--model_name_or_path",
        tiny_chat_model_dir,
        *GREEDY,
    ]
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        process.stdin.write("the cat 你好\nthe mat\n".encode())
        process.stdin.flush()
        wait_until(lambda: lines_in(told), process)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130 and printed


def test_log_stats_and_refused_turns(tiny_chat_model_dir, oracle, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"cut by a crash": "')
    lines = ["/stats", "the cat", "\x07bell", "/reset", "/system be brief", "你好", "and", "/stats"]
    status, printed, said = chat(
        tiny_chat_model_dir, *GREEDY, "--max_new_tokens", "20", "--log", log, input="\n".join(lines)
    )
    system = {"role": "system", "content": "be brief"}
    answers = [oracle([user("the cat")]), oracle([system, user("你好")])]
    told = [
        user("the cat"),
        {"role": "assistant", "content": answers[0]},
        system,
        user("你好"),
        {"role": "assistant", "content": answers[1]},
        user("and"),
    ]
    answers.append(oracle([system, *told[3:]]))
    told.append({"role": "assistant", "content": answers[2]})
    assert (status, printed) == (2, "".join(answer + "\n" for answer in answers))
    assert "(no answer yet)" in said and "the control character U+0007 (character 1)" in said
    figures = re.search(
        r"\(20 tokens, the first after [\d.]+ s, then [\d,.]+ tokens/s, (\d+) of "
        r"(\d+) prompt tokens were cached\)",
        said,
    )
    assert 20 < int(figures[1]) < int(figures[2])
    begun, *rows = log.read_text("utf-8").splitlines()
    assert begun == '{"cut by a crash": "'
    rows, joined = [json.loads(row) for row in rows], []
    for row in rows:  # an answer that took more than a second has several rows
        if joined and row["role"] == joined[-1]["role"] == "assistant":
            joined[-1]["content"] += row["content"]
        else:
            joined.append({"role": row["role"], "content": row["content"]})
    assert joined == told
    assert [row["conversation"] for row in rows if row["role"] == "user"] == [1, 2, 2]
    assert [row["end"] for row in rows if "end" in row] == ["truncated"] * 3


@pytest.mark.parametrize("end", ["complete", "truncated", "stopped"])
def test_the_last_line_of_an_answer_says_how_it_ended(end, tmp_path):
    answer = Answer(started=0.0, num_prompt_tokens=1, is_truncated=end == "truncated")
    answer.pieces = (piece for piece in ["the ", "cat"])
    transcript = Transcript(tmp_path / "log.jsonl")
    pieces = transcript.log_answer(1, answer)
    next(pieces)
    if end == "stopped":
        pieces.close()
    else:
        list(pieces)
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (line["content"], line["end"]) == ("the " + "cat" * (end != "stopped"), end)
    assert (transcript.new_conversation(), transcript.new_conversation()) == (1, 2)


def test_conversations_of_several_runs_have_different_numbers(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"of another program": 9}\n')
    for first in (1, 3):
        transcript = Transcript(log)
        for number in (first, first + 1):
            assert transcript.new_conversation() == number
            transcript.log_question(number, "", "the cat")
    lines = map(json.loads, log.read_text().splitlines()[1:])
    assert [line["conversation"] for line in lines] == [1, 2, 3, 4]


def test_a_crash_loses_nothing_of_the_transcript(tiny_chat_model_dir, oracle, tmp_path):
    """If chat.py is killed while it computes the tenth token, the first nine are in the file."""
    told, log = tmp_path / "told", tmp_path / "log"
    # The transcript writes a line when this much time has passed: here for every token.
    standing = standing_still(
        TOKEN, [10], told, **{"minisft.chat.transcript:SECONDS_BETWEEN_PARTS": -1}
    )
    words = [*standing[1:], SCRIPT, "--model_name_or_path", tiny_chat_model_dir, *GREEDY]
    process = Forked("tests/standing.py", [*words, "--prompt", "the cat 你好", "--log", log])
    wait_until(lambda: lines_in(told), process)
    process.kill()
    process.communicate()
    question, *parts = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert question["role"] == "user" and question["content"] == "the cat 你好"
    assert [row["role"] for row in parts] == ["assistant"] * 9
    said = "".join(row["content"] for row in parts)
    assert said and oracle([user("the cat 你好")]).startswith(said)
    assert not any("end" in row for row in parts)


class Terminal:
    """chat.py in its own terminal: press keys, wait for output."""

    def __init__(self, *arguments, output=None, standing=()):
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            if output:
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
            words = [sys.executable, *standing, SCRIPT, *arguments]
            os.execve(sys.executable, list(map(str, words)), ENVIRONMENT)
        self.screen = b""

    def press(self, keys):
        os.write(self.descriptor, keys.encode())

    def wait_for(self, text):
        """Wait for `text`; return the output up to it, and remove that from the screen."""
        while text.encode() not in self.screen:
            ready, _, _ = select.select([self.descriptor], [], [], HANG_SECONDS)
            assert ready, f"{text!r} has not appeared: {self.screen.decode(errors='replace')}"
            self.screen += os.read(self.descriptor, 65536)
        before, _, self.screen = self.screen.partition(text.encode())
        return before.decode()  # strict: half a character would raise

    def wait_for_prompt(self):
        """Wait until chat.py reads at the prompt: Python loses a Ctrl-C in the moment before."""
        self.wait_for(PROMPT)
        self.wait_until_it_reads()

    def wait_until_it_reads(self):
        """Wait until its main thread sleeps, which it does only while it waits for keys."""
        wait_until(lambda: state_of(self.pid) == "S")

    def exit_status(self):
        with contextlib.suppress(OSError):  # a closed terminal reads like this
            while chunk := os.read(self.descriptor, 65536):
                self.screen += chunk
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(tiny_chat_model_dir):
    started = []

    def start(*flags, **more):
        started.append(
            Terminal("--model_name_or_path", tiny_chat_model_dir, *GREEDY, *flags, **more)
        )
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(one.pid, os.WNOHANG)[0] == 0:
                os.kill(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)
        os.close(one.descriptor)


def test_terminal_with_ctrl_c(terminal, oracle, tmp_path):
    """Ctrl-C during the first, tenth and nineteenth token of three answers, and at the prompt."""
    told, saved = tmp_path / "told", tmp_path / "saved.json"
    screen = terminal(standing=standing_still(TOKEN, [1, 11, 30], told))
    assert "template auto · cpu float32 · context 20000" in screen.wait_for("/help lists")
    for number in (1, 2, 3):
        screen.wait_for(PROMPT)
        screen.press("/reset\r")
        screen.wait_for("(conversation cleared)")
        screen.wait_for(PROMPT)
        screen.press("the cat 你好\r")
        screen.wait_for("你好" + ENTERED)
        wait_until(lambda number=number: lines_in(told) == number)
        screen.press("\x03")
        screen.wait_for("(stopped)")
    # The text so far is kept.
    screen.wait_for(PROMPT)
    screen.press(f"/save {saved}\r")
    screen.wait_for("saved to")
    question, answer = json.loads(saved.read_text("utf-8"))[0]["messages"]
    assert question == user("the cat 你好") and answer["role"] == "assistant"
    assert answer["content"] and oracle([question]).startswith(answer["content"])
    # At the prompt the first Ctrl-C only explains how to leave, even if half a line is typed.
    screen.wait_for(PROMPT)
    screen.press("half a line")
    screen.wait_for("half a line")
    screen.wait_until_it_reads()
    screen.press("\x03")
    screen.wait_for("Ctrl-C again leaves")
    screen.wait_for(PROMPT)
    screen.press("/reset\r")
    screen.wait_for("(conversation cleared)")
    screen.wait_for_prompt()
    screen.press("\x03")
    screen.wait_for("Ctrl-C again leaves")
    screen.wait_for_prompt()
    screen.press("\x03")
    assert screen.exit_status() == 0


def test_terminal_answers_as_a_pipe_does_and_ctrl_d_leaves(terminal, tiny_chat_model_dir, oracle):
    screen = terminal("--max_new_tokens", "20")
    screen.wait_for(PROMPT)
    # Backspace removes characters, not bytes or columns. Here it removes two.
    screen.press("the cat 你好吗呢\x7f\x7f\r")
    screen.wait_for(ENTERED)
    shown = screen.wait_for("\033[2m(truncated")
    expected = oracle([user("the cat 你好")])
    visible = [one for one in expected if one.isprintable() or one > "\x9f"]
    assert [one for one in shown if one not in "\r\n\t"] == visible
    screen.wait_for(PROMPT)
    screen.press("\x04")
    assert screen.exit_status() == 0


@pytest.mark.skipif("libedit" in readline.__doc__, reason="libedit does not know pasted text")
def test_pasted_text_is_one_message(terminal, oracle, tmp_path):
    """A terminal marks where pasted text begins and ends, so it may have several lines."""
    screen = terminal("--max_new_tokens", "20")
    screen.wait_for("\033[?2004h")  # asks the terminal for these marks
    screen.wait_for(PROMPT)
    screen.press("\033[200~the cat\r你好\r/quit\033[201~\r")
    screen.wait_for("(truncated")
    screen.wait_for(PROMPT)
    screen.press(f"/save {tmp_path}/saved.json\r")
    screen.wait_for("(2 messages saved")
    question, answer = json.loads((tmp_path / "saved.json").read_text("utf-8"))[0]["messages"]
    assert question == user("the cat\n你好\n/quit") and answer["content"] == oracle([question])


def test_typed_questions_with_the_answers_going_to_a_file(terminal, oracle, tmp_path):
    screen = terminal("--max_new_tokens", "20", output=tmp_path / "answers.txt")
    screen.wait_for("/help lists")
    screen.wait_for("> ")
    screen.press("the cat 你好\r")
    screen.wait_for("> ")
    screen.press("\x04")
    assert screen.exit_status() == 0
    answer = oracle([user("the cat 你好")])
    assert (tmp_path / "answers.txt").read_bytes().decode() == answer + "\n"


def test_question_interrupted_by_ctrl_c_exits_130(terminal, tmp_path):
    screen = terminal(
        "--prompt", "the cat 你好", standing=standing_still(TOKEN, [10], tmp_path / "told")
    )
    wait_until(lambda: lines_in(tmp_path / "told"))
    screen.press("\x03")
    screen.wait_for("(stopped)")
    assert screen.exit_status() == 130


class Recorder:
    """Stands in for a Conversation: collects the questions."""

    def __init__(self):
        self.assistant, self.questions = SimpleNamespace(description="a model"), []

    def ask(self, question):
        self.questions.append(question)
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("command", ["/quit", "/exit", "/bye"])
def test_commands_that_leave(command, is_terminal, monkeypatch, capsys):
    """In a terminal and through a pipe, as in other chats."""
    lines = iter(["/exit/now", command, "more"])
    monkeypatch.setattr("minisft.chat.terminal.read_line", lambda: next(lines))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: is_terminal))
    conversation = Recorder()
    assert converse(conversation) == 0 and conversation.questions == ["/exit/now"]
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_words_that_leave_a_terminal(is_terminal, monkeypatch, capsys):
    """Alone on a line. After a space, in a sentence and through a pipe they are messages."""
    lines = [" exit", "bye now", "Quit", "more", None]
    lines_to_read = iter(lines)
    monkeypatch.setattr("minisft.chat.terminal.read_line", lambda: next(lines_to_read))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: is_terminal))
    conversation = Recorder()
    assert converse(conversation) == 0
    assert conversation.questions == (lines[:2] if is_terminal else lines[:-1])
    said = capsys.readouterr().err
    assert ('say "Quit" to the model' in said) == is_terminal
    assert ('"Quit" is a message to the model; /quit leaves' in said) != is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_in_an_answer_moves_the_text_of_a_terminal(is_terminal, monkeypatch):
    """Control characters and Unicode's overrides of direction; Arabic and emoji stay."""
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: is_terminal))
    kept = "a\n\tb \u0633\u0644\u0627\u0645 \U0001f468\u200d\U0001f469 \u200f\u3000"
    unsafe = "".join(
        char
        for char in map(chr, range(0x110000))
        if unicodedata.category(char) == "Cc"
        and char not in "\n\t"
        or unicodedata.bidirectional(char)
        in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    )
    text = kept + unsafe
    assert printable(text) == (kept if is_terminal else text)
