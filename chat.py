"""Talk to a model: in the terminal, with one question, with a file of them, or on a web page.

    python chat.py --model_name_or_path examples/base --adapter runs/demo
    python chat.py --model_name_or_path examples/base --adapter runs/demo --prompt "What is 2 + 2?"
    python chat.py --model_name_or_path examples/base --template plain --prompt - < question.txt
    python chat.py --model_name_or_path MODEL --file prompts.jsonl --output answers.jsonl
    python chat.py --model_name_or_path examples/base --adapter runs/demo --web --compare_with none

Without a terminal and without --prompt, every line of standard input is a turn of one conversation;
a line that is refused does not end it, but the exit status is then 2 instead of 0. Answers go to
standard output, everything else to standard error.
"""

import dataclasses
import os
import sys

from minisft.chat.terminal import BYTE_ORDER_MARK
from minisft.common.command_line import OptionParser, optional_int, positive_int
from minisft.common.errors import UserError
from minisft.common.model_flags import add_model_flags, dtype_option
from minisft.common.script import run_script

KEPT_ON_THE_WEB = 8  # conversations whose next turn computes only what is new
KEPT_COMPILED = 2  # of those with --compile, each of which takes the memory of a full context


def main():
    """Answer --prompt or --file, serve a page, or hold a conversation until the input ends."""
    options = parse_options()
    # None if started with them closed.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout, sys.stderr = (one or open(os.devnull, "w") for one in (sys.stdout, sys.stderr))
    for stream in (sys.stdin, sys.stdout):
        # Whatever the locale says; bytes that are no text become a replacement character.
        stream.reconfigure(encoding="utf-8", errors="replace")
    question = read_question(options.prompt)
    system = read_identity(options.identity) if options.identity else as_text(options.system)

    # Imported here, since `--help` and a mistyped flag should not wait for torch.
    from minisft.generation.generate import Sampling

    sampling = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.greedy,
        options.seed,
    )
    if options.file:
        answer_file(options, system, sampling)
    elif options.web:
        serve(options, system, sampling)
    else:
        talk(options, system, sampling, question)


def parse_options():
    """The options of the command line; UserError for a flag or value that makes no sense."""
    parser = OptionParser(
        description="Talk to a model: in the terminal, with one question, with a "
        "file of them, or on a web page."
    )
    add_model_flags(parser)
    add, _ = parser.section("conversation")
    add("--adapter", metavar="DIR", help="folder of a LoRA adapter, used without merging")
    add("--template", default="auto", help="form of the conversation (auto: the checkpoint's own)")
    add("--system", help="system prompt")
    add("--identity", metavar="FILE", help="text file with the system prompt: a persona or a task")
    add("--prompt", help="ask this one question and leave; - reads it from standard input")
    add("--max_length", type=int, help="longest conversation in tokens (else the model's context)")
    add("--log", metavar="FILE", help="add the conversation to a file of JSON lines as it goes")
    add, switch = parser.section("answers")
    add("--max_new_tokens", type=int, default=512, help="longest answer in tokens")
    add("--temperature", type=float, default=0.95, help="below 1 more certain, above wilder")
    add("--top_k", type=int, default=50, help="draw from this many best tokens; 0: all")
    add("--top_p", type=float, default=0.7, help="draw from the best tokens with this probability")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 repeats less")
    switch("--greedy", help="always the most probable token, the same every time")
    add("--seed", type=optional_int, help="draw the same answers again")
    switch("--compile", "a minute at the start, then faster answers, on a GPU above all")
    add, _ = parser.section("a file of prompts")
    add("--file", metavar="FILE", help="answer the lines of a .txt, or the rows of a JSON(L) file")
    add("--output", metavar="FILE", help="write the answers here, as JSON lines")
    add("--batch_size", type=positive_int, default=8, help="prompts answered at once")
    add, switch = parser.section("web page")
    switch("--web", help="serve a page to chat on (needs gradio, see requirements-extras.txt)")
    add("--compare_with", metavar="DIR", help="answer beside it: another adapter, or none")
    add("--server_name", default="127.0.0.1", help="address to serve at; 0.0.0.0: to the network")
    add("--server_port", type=positive_int, default=7860, help="port to serve at")
    add("--password", help="asked for before the page (or set MINISFT_PASSWORD)")
    switch("--share", help="also through a public address at gradio's servers")
    options = parser.parse_options()
    check_options(options, parser.given(options))
    return options


def check_options(options, given):
    """UserError where flags contradict each other or would not be heeded."""
    if options.max_length is not None and options.max_length < 2:
        raise UserError(f"--max_length must be at least 2, not {options.max_length}")
    if options.server_port > 65535:
        raise UserError(f"--server_port must be at most 65535, not {options.server_port}")
    if options.password == "":
        raise UserError("--password is empty, which would let everybody in; leave it out for that")
    for exclusive in (("prompt", "file", "web"), ("system", "identity")):
        if len(both := [f"--{name}" for name in exclusive if name in given]) > 1:
            raise UserError(f"{' and '.join(both)} exclude each other; give one")
    for needed, names in (
        ("file", ("output", "batch_size")),
        ("web", ("compare_with", "server_name", "server_port", "password", "share")),
    ):
        for name in names:
            if name in given and needed not in given:
                raise UserError(f"--{name} belongs to --{needed}, which is not given")
    if options.file and not options.output:
        raise UserError("--file needs --output, the file for the answers")
    if options.file and options.log:
        raise UserError("--log is for conversations; the answers to --file are in its --output")
    if options.file and options.compile:
        raise UserError("--compile is for conversations; --file is answered in batches")
    if options.compile and options.quantization_bit == 4:
        raise UserError("--compile contradicts --quantization_bit 4; 8 can be compiled")


def read_question(prompt):
    """The text of --prompt, from standard input for `-`; None if it was not given."""
    text = sys.stdin.read() if prompt == "-" else as_text(prompt)
    text = text and text.removeprefix(BYTE_ORDER_MARK)
    if text is not None and not text.strip():
        raise UserError("--prompt: the question is empty")
    return text


def read_identity(path):
    """The text of --identity, which every conversation begins with."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read().strip()
    except OSError as error:
        raise UserError(f"--identity {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--identity {path}: not UTF-8 text; convert the file") from error
    if not text:
        raise UserError(f"--identity {path}: the file is empty")
    return text


def as_text(argument):
    """A command-line argument as text: bytes that were no UTF-8 arrive as surrogates."""
    return argument and argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def load_assistant(options, system, sampling, **more):
    """The Assistant that the options describe, in whose context the system prompt has room."""
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.generation.assistant import Assistant

    device = resolve_device(options.device)
    assistant = Assistant(
        options.model_name_or_path,
        options.adapter,
        options.template,
        device,
        resolve_dtype(dtype_option(options), device),
        options.max_length,
        quantization_bit=options.quantization_bit,
        compiled=options.compile,
        **more,
    )
    if system:
        name = f"--identity {options.identity}" if options.identity else "--system"
        assistant.check_system(system, sampling.max_new_tokens, name)
    return assistant


def talk(options, system, sampling, question):
    """One question, or a conversation in the terminal."""
    from minisft.chat.terminal import INTERRUPTED, Conversation, converse, notice
    from minisft.chat.transcript import Transcript

    conversation = Conversation(system, Transcript(options.log))
    assistant = load_assistant(options, system, sampling)
    if question is not None:
        sys.exit(0 if conversation.ask(question, assistant, sampling) else INTERRUPTED)
    if sys.stdin.isatty():
        notice(f"{assistant.description} · /help lists the commands")
    sys.exit(converse(conversation, assistant, sampling))


def answer_file(options, system, sampling):
    """A file of prompts, answered into another file."""
    from minisft.chat import prompts

    settings = {"system": system, **dataclasses.asdict(sampling)}
    for name in ("model_name_or_path", "adapter", "template", "max_length", "quantization_bit"):
        settings[name] = getattr(options, name)
    number = prompts.answer_file(
        load_assistant(options, system, sampling),
        options.file,
        options.output,
        sampling,
        options.batch_size,
        system,
        settings,
    )
    print(f"{options.output}: {number} answers", file=sys.stderr)


def serve(options, system, sampling):
    """A page for the browser, until Ctrl-C."""
    from minisft.chat import web
    from minisft.chat.page import Page
    from minisft.chat.transcript import Transcript

    web.check_gradio()
    transcript = Transcript(options.log)
    kept = KEPT_COMPILED if options.compile else KEPT_ON_THE_WEB
    if not options.compare_with:
        assistants = [load_assistant(options, system, sampling, kept_conversations=kept)]
    else:
        assistants = load_pair(options, system, sampling, kept)
    page = Page(assistants, sampling, system or "", transcript)
    web.serve(
        page,
        options.server_name,
        options.server_port,
        options.password or os.environ.get("MINISFT_PASSWORD"),
        options.share,
    )


def load_pair(options, system, sampling, kept):
    """The Assistants of --adapter and --compare_with, which share the weights of their base.

    Without an adapter of its own the second speaks in the first one's template.
    """
    from minisft.checkpoints.folders import load_model
    from minisft.checkpoints.hub import resolve
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.generation.sharing import Turns

    device = resolve_device(options.device)
    model = load_model(
        resolve(options.model_name_or_path),
        resolve_dtype(dtype_option(options), device),
        device,
        options.quantization_bit,
    )
    shared = {"model": model, "turns": Turns(), "kept_conversations": kept}
    first = load_assistant(options, system, sampling, **shared)
    if options.compare_with == "none":
        options.adapter, options.template = None, first.template.name
    else:
        options.adapter = options.compare_with
    return [first, load_assistant(options, system, sampling, **shared)]


if __name__ == "__main__":
    run_script(main)
