"""Talk to a model in the terminal, or ask it one question.

    python chat.py --model_name_or_path examples/base --adapter runs/demo
    python chat.py --model_name_or_path examples/base --prompt "What is 2 + 2?"
    python chat.py --model_name_or_path examples/base --prompt - < question.txt

Without a terminal and without --prompt, every line of standard input is a turn of one conversation.
Answers go to standard output, everything else to standard error.
"""

import contextlib
import json
import os
import sys

from minisft.options import (
    OptionParser,
    UserError,
    add_model_flags,
    optional_int,
    resolve_device,
    resolve_dtype,
    run,
)

BYTE_ORDER_MARK = "\ufeff"  # what some editors begin a file with
INTERRUPTED = 130  # exit status, as a shell has it: 128 + SIGINT
HELP = """\
/reset          forget the conversation (the system prompt stays)
/system TEXT    set the system prompt; without TEXT, go back to the template's own, if any
/save FILE      write the conversation as JSON that train.py reads
/help           this list
/quit           leave (Ctrl-D does too)
Ctrl-C stops an answer."""


def main():
    """Answer --prompt, or hold a conversation until the input ends."""
    options = parse_options()
    # None if started with them closed.
    sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout):
        # Whatever the locale says; bytes that are no text become a replacement character.
        stream.reconfigure(encoding="utf-8", errors="replace")
    question = read_question(options.prompt)

    # Imported here, since `--help` and a mistyped flag should not wait for torch.
    from minisft.assistant import Assistant
    from minisft.generate import Sampling

    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p,
        options.repetition_penalty, options.greedy, options.seed,
    )
    device = resolve_device(options)
    assistant = Assistant(
        options.model_name_or_path, options.adapter, options.template,
        device, resolve_dtype(options, device), options.max_length,
    )
    conversation = Conversation(as_text(options.system))
    if question is not None:
        sys.exit(0 if conversation.ask(question, assistant, sampling) else INTERRUPTED)
    if sys.stdin.isatty():
        name = os.path.basename(os.path.abspath(options.model_name_or_path))
        dtype = str(assistant.dtype).removeprefix("torch.")
        notice(f"{name} · template {assistant.template.name} · {device} {dtype} · "
               f"context {assistant.max_length} · /help lists the commands")
    converse(conversation, assistant, sampling)


def parse_options():
    """The options of the command line; UserError for a flag or value that makes no sense."""
    parser = OptionParser(description="Talk to a model: in the terminal, or one question.")
    add_model_flags(parser)
    add, _ = parser.section("conversation")
    add("--adapter", metavar="DIR", help="folder of a LoRA adapter, used without merging")
    add("--template", default="auto", help="form of the conversation (auto: the checkpoint's own)")
    add("--system", help="system prompt")
    add("--prompt", help="ask this one question and leave; - reads it from standard input")
    add("--max_length", type=int, help="longest conversation in tokens (else the model's context)")
    add, switch = parser.section("answers")
    add("--max_new_tokens", type=int, default=512, help="longest answer in tokens")
    add("--temperature", type=float, default=0.95, help="below 1 more certain, above wilder")
    add("--top_k", type=int, default=50, help="draw from this many best tokens; 0: all")
    add("--top_p", type=float, default=0.7, help="draw from the best tokens with this probability")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 repeats less")
    switch("--greedy", help="always the most probable token, the same every time")
    add("--seed", type=optional_int, help="draw the same answers again")
    options = parser.parse_options()
    if options.max_length is not None and options.max_length < 2:
        raise UserError(f"--max_length must be at least 2, not {options.max_length}")
    return options


def read_question(prompt):
    """The text of --prompt, from standard input for `-`; None if it was not given."""
    text = sys.stdin.read() if prompt == "-" else as_text(prompt)
    text = text and text.removeprefix(BYTE_ORDER_MARK)
    if text is not None and not text.strip():
        raise UserError("--prompt: the question is empty")
    return text


def as_text(argument):
    """A command-line argument as text: bytes that were no UTF-8 arrive as surrogates."""
    return argument and argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def converse(conversation, assistant, sampling):
    """Read and answer until the end of the input."""
    interrupted = False
    while True:
        try:
            line = read_line()
            interrupted = False
            if line is None:
                return
            name, argument = split_command(line)
            if name == "/quit":
                return
            if name:
                conversation.command(name, argument)
            elif line.strip():
                conversation.ask(line, assistant, sampling)
        except UserError as error:
            notice(f"error: {error}")
        except KeyboardInterrupt:
            if interrupted:
                print(file=sys.stderr)
                return
            interrupted = True
            notice("\n(Ctrl-C again leaves; so does /quit)")


def read_line():
    """The next line of input, or None at its end."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if sys.stdin.isatty():  # the answers go to a file, into which input() would prompt
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.removeprefix(BYTE_ORDER_MARK).rstrip("\r\n") if line else None
    try:
        import readline  # noqa: F401  (its import gives input() editing and history)
    except ImportError:
        pass
    # \001 and \002 tell readline which characters of the prompt have no width.
    prompt = "\001\033[1;32m\002>\001\033[0m\002 " if coloured(sys.stdout) else "> "
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


def split_command(line):
    """(`/word`, what follows it) of a command; ("", the line) of a message.

    Only a word of ASCII letters is a command: `/etc/hosts is missing` and `/你好` are messages.
    """
    word, *rest = line.split(maxsplit=1) or [""]  # also at the wide space of Chinese input
    if word.startswith("/") and word.isascii() and word[1:].isalpha():
        return word, rest[0].strip() if rest else ""
    return "", line


class Conversation:
    """What was said, and which of it the model still sees."""

    def __init__(self, system=None):
        self.system, self.turns, self.seen_from, self.saved_to = system, [], 0, set()

    def messages(self, turns):
        """`turns` behind the system prompt, if there is one."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + turns

    def ask(self, question, assistant, sampling):
        """Stream the answer to standard output and keep both; True if it came to its end.

        Ctrl-C keeps what has come, or nothing of the turn if nothing has.
        """
        turns = self.turns + [{"role": "user", "content": question}]
        messages = assistant.fit(self.messages(turns[self.seen_from :]), sampling.max_new_tokens)
        first = len(turns) - len(messages) + bool(self.system)
        if first > self.seen_from:
            notice(f"(the conversation is longer than {assistant.max_length} tokens: "
                   f"the oldest {first} messages are no longer seen)")
        answer, complete = "", False
        try:
            with contextlib.closing(assistant.stream(messages, sampling)) as pieces:
                for piece in pieces:
                    print(shown(piece), end="", flush=True)
                    answer += piece
            print()
            if assistant.cut_short:
                notice("(cut: the answer has used up the room it had)")
            complete = True
        except KeyboardInterrupt:
            notice("\n(stopped)")
        # A turn without words could not be learned from, so it is no part of what /save writes.
        if answer.strip():
            self.turns = turns + [{"role": "assistant", "content": answer}]
            self.seen_from = first
        elif complete:
            notice("(no answer: the question is not remembered)")
        return complete

    def command(self, name, argument):
        """Carry out `/name argument`; UserError if there is no such command."""
        if name == "/help":
            notice(HELP)
        elif name == "/reset":
            self.turns, self.seen_from = [], 0
            notice("(forgotten)")
        elif name == "/system":
            self.system = argument or None
            notice("(system prompt set)" if argument else "(system prompt removed)")
        elif name == "/save":
            self.save(argument)
        else:
            raise UserError(f"{name} is not a command; /help lists them")

    def save(self, path):
        """Write the conversation as a data set of one row; no other file is overwritten."""
        if not path:
            raise UserError("/save needs the name of a file")
        if not self.turns:
            raise UserError("there is nothing to save yet")
        path = os.path.expanduser(path)
        text = json.dumps([{"messages": self.messages(self.turns)}], ensure_ascii=False, indent=2)
        try:
            with open(path, "w" if path in self.saved_to else "x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError as error:
            raise UserError(f"{path} exists; choose another name") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: {reason}; choose another name") from error
        self.saved_to.add(path)
        notice(f"({len(self.turns)} messages saved to {path})")


def shown(text):
    """The text for standard output; on a terminal without the characters that would steer it."""
    if not sys.stdout.isatty():
        return text
    return "".join(one for one in text if one in "\n\t" or one.isprintable() or one > "\x9f")


def notice(text):
    """Say something that is not part of the answer."""
    print(f"\033[2m{text}\033[0m" if coloured(sys.stderr) else text, file=sys.stderr, flush=True)


def coloured(stream):
    """Whether to use colours: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


if __name__ == "__main__":
    run(main)
