"""The flags of `chat.py`, and the texts of the prompts that they name.

options = parse_options(["--model_name_or_path", "examples/base", "--default_system", "Be brief."])
read_system(options)                                # "Be brief."
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable

from minisft.common.command_line import (
    Neighbour,
    OptionParser,
    check_rules,
    optional_int,
    positive_int,
    report_without_effect,
)
from minisft.common.errors import UserError
from minisft.common.model_flags import add_model_flags, add_template_flags
from minisft.common.option_types import with_line_breaks

EXAMPLES = """\
  python chat.py --adapter runs/a
  python chat.py --model_name_or_path M --prompt "What is 2 + 2?" --greedy
  python chat.py --adapter runs/a --file prompts.jsonl --output answers.jsonl
"""
# What chat.py does without --prompt, --file and --web.
CONVERSES: Neighbour = ((True,), "use --prompt for one question")
BYTE_ORDER_MARK = "\ufeff"  # some editors write it at the beginning of a file


def parse_options(arguments: Iterable[str] | None = None) -> Namespace:
    """The options of chat.py, by default from the command line."""
    parser = OptionParser(
        EXAMPLES,
        "model_name_or_path adapter prompt file output web max_new_tokens temperature greedy",
        description="Chat with a model: in the terminal, with one question, with a file of "
        "prompts, or on a web page.",
        neighbours={
            **dict.fromkeys(("interactive", "i", "conversation", "cnv", "chat"), CONVERSES),
            "do_sample": ((True,), "use --greedy"),
            "stream": ((True,), "an answer appears while it is written; --file collects answers"),
            "num_beams": ((1,), "minisft samples, or takes the most probable token with --greedy"),
        },
    )
    add_model_flags(parser)
    add, _ = parser.section("conversation")
    add("--adapter", metavar="DIR", help="folder of a LoRA adapter; it is not merged")
    add_template_flags(add, auto="as in training")
    add("--identity", metavar="FILE", help="text file with the system prompt: a persona or a task")
    add("--prompt", help="ask one question and exit; - reads it from standard input")
    add(
        "--max_length",
        type=int,
        help="maximum tokens of a conversation (default: the model's context)",
    )
    add("--log", metavar="FILE", help="append the conversation to this file, as JSON lines")
    add, switch = parser.section("answers")
    add("--max_new_tokens", type=int, default=512, help="maximum tokens of an answer")
    add(
        "--temperature",
        type=float,
        default=0.95,
        help="below 1: more predictable; above 1: more varied",
    )
    add("--top_k", type=int, default=50, help="sample from the k most probable tokens; 0: all")
    add(
        "--top_p",
        type=float,
        default=0.7,
        help="nucleus sampling: keep the smallest set of tokens with this total probability",
    )
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less")
    switch("--greedy", help="always take the most probable token")
    add("--seed", type=optional_int, help="make sampling repeatable")
    switch("--compile", help="compile the model: a minute at the start, then faster answers")
    add, switch = parser.section("a file of prompts")
    add(
        "--file",
        metavar="FILE",
        help="answer the lines of a .txt file, or the rows of JSON or JSON lines",
    )
    add("--output", metavar="FILE", help="file for the answers, as JSON lines")
    switch("--overwrite", "replace the file if there is one")
    add("--max_samples", type=positive_int, help="only the first N prompts of the file")
    add("--batch_size", type=positive_int, default=8, help="prompts answered at once")
    add, switch = parser.section("web page")
    switch("--web", help="serve a page to chat on (needs gradio, see requirements/web.txt)")
    add(
        "--compare_with",
        metavar="DIR",
        help="a second model side by side: an adapter, or none for the base",
    )
    add("--server_name", default="127.0.0.1", help="address; 0.0.0.0 is open to the network")
    add("--server_port", type=positive_int, default=7860, help="port")
    add("--password", help="password of the page (or set MINISFT_PASSWORD)")
    switch("--share", help="also serve at a public address, through gradio's servers")
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


def check_options(options: Namespace, given: set[str]) -> None:
    """Raise UserError for flags that contradict each other or have no effect."""
    if options.max_length is not None and options.max_length < 2:
        raise UserError(f"--max_length must be at least 2, not {options.max_length}")
    if options.server_port > 65535:
        raise UserError(f"--server_port must be at most 65535, not {options.server_port}")
    if options.web:
        read_password(options)
    for exclusive in (("prompt", "file", "web"), ("default_system", "identity")):
        flags = [f"--{name}" for name in exclusive if name in given]
        if len(flags) > 1:
            raise UserError(f"{' and '.join(flags)} exclude each other. Give one of them.")
    of_file = {"output", "overwrite", "batch_size", "max_samples"}
    of_page = {"compare_with", "server_name", "server_port", "password", "share"}
    rules = [
        (of_file, "file" not in given, "belongs to --file, which is not given"),
        (of_page, "web" not in given, "belongs to --web, which is not given"),
    ]
    check_rules(rules, given)
    if options.file and not options.output:
        raise UserError("--file needs --output, the file for the answers")
    if options.file and options.log:
        raise UserError("--log is for conversations. The answers to --file are in its --output.")
    if options.file and options.compile:
        raise UserError("--compile is for conversations. --file is answered in batches.")
    if options.compile and options.quantization_bit == 4:
        raise UserError("--compile contradicts --quantization_bit 4. Use --quantization_bit 8.")
    if not options.web:  # the page has a switch for greedy answers
        reason = "--greedy takes the most probable token"
        ignored = {"temperature", "top_k", "top_p", "seed"}
        report_without_effect(given, [(ignored, options.greedy, reason)])


def read_password(options: Namespace) -> str | None:
    """The password of the web page: --password, else the variable MINISFT_PASSWORD."""
    name, password = "--password", options.password
    if password is None:
        name, password = "MINISFT_PASSWORD", os.environ.get("MINISFT_PASSWORD")
    if password == "":  # in a script, from a variable that is not set
        raise UserError(f"{name} is empty. For a page without a password, leave it out.")
    return password


def read_question(options: Namespace) -> str | None:
    """The text of --prompt, for `-` from standard input; None without --prompt."""
    text = sys.stdin.read() if options.prompt == "-" else _decode(options.prompt)
    if text is None:
        return None
    text = text.removeprefix(BYTE_ORDER_MARK)
    if not text.strip():
        raise UserError("--prompt: the question is empty")
    return text


def read_system(options: Namespace) -> str | None:
    """The system prompt: the text of --default_system, or of the file --identity."""
    path = options.identity
    if not path:
        return _decode(options.default_system)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read().strip()
    except OSError as error:
        raise UserError(f"--identity {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--identity {path}: not UTF-8 text. Convert the file.") from error
    if not text:
        raise UserError(f"--identity {path}: the file is empty")
    return with_line_breaks(text, f"--identity {path}")


def _decode(argument: str | None) -> str | None:
    """The argument as UTF-8 text. Python turns other bytes of the command line into surrogates."""
    return argument and argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
