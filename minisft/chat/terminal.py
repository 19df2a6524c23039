"""A conversation in a terminal, or line by line through a pipe.

    conversation = Conversation(assistant, Sampling(greedy=True), system="Be brief.")
    conversation.ask("What is 2 + 2?")
    converse(conversation)                              # until the input ends

Answers go to standard output, everything else to standard error.
"""

import contextlib
import os
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import TextIO

from minisft.chat.options import BYTE_ORDER_MARK
from minisft.chat.transcript import Transcript
from minisft.common.colours import has_colours
from minisft.common.errors import UserError
from minisft.common.json_files import write_json
from minisft.generation.answer import Answer
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.text.messages import Message

FAILED = 2  # exit status after a refused message or command
INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell: 128 + SIGINT
# After a slash they leave everywhere; alone on a line, on a terminal only.
LEAVING_WORDS = ("exit", "quit", "bye")
# Unicode's embeddings, overrides and isolates: what follows them may be shown backwards.
DIRECTIONS = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
HELP = """\
/reset          clear the conversation (or /clear); the system prompt stays
/system TEXT    set the system prompt; without TEXT, restore the initial one
/save FILE      write the conversation as JSON that train.py reads
/stats          length and speed of the last answer
/help           list the commands (or /?)
/quit           leave (or /exit, /bye, Ctrl-D; on a terminal also exit, quit, bye alone on a line)
Ctrl-C stops an answer."""


def open_standard_streams() -> None:
    """Make standard input and output UTF-8 in every locale.

    UserError if standard output is closed: the answers would be lost.
    """
    if sys.__stdout__ is None:  # run_script has replaced sys.stdout
        raise UserError("standard output is closed, so answers cannot be written. Open it.")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


class Conversation:
    """The turns so far, the system prompt, and the commands of the terminal."""

    def __init__(
        self,
        assistant: Assistant,
        sampling: Sampling,
        system: str | None = None,
        transcript: Transcript | None = None,
    ):
        self.assistant, self.sampling = assistant, sampling
        self.first_system, self.system = system, system
        self.turns: list[Message] = []
        self.transcript = transcript or Transcript()
        self.number = self.transcript.new_conversation()
        self.answer: Answer | None = None  # the last one
        self.saved_paths: set[str] = set()

    def ask(self, question: str) -> bool:
        """Print the answer and add both to the turns; False if Ctrl-C stopped it.

        A stopped answer is added unchanged. Without any text, the question is not added either.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        answer = self.answer = self.assistant.stream(
            self._with_system(turns), self.sampling, say=lambda text: notice(f"({text})")
        )
        self.transcript.log_question(self.number, self.system or "", question)
        is_complete = False
        try:
            with contextlib.closing(self.transcript.log_answer(self.number, answer)) as pieces:
                show_pieces(pieces, answer)
            print()
            if answer.is_truncated:
                notice("(truncated: the answer reached its maximum length)")
            is_complete = True
        except KeyboardInterrupt:
            notice("\n(stopped)")
        finally:
            answer.close()
            # An answer without text cannot be trained on, so /save must not write it.
            if answer.text.strip():
                self.turns = [*turns, answer.message]
        if is_complete and not answer.text.strip():
            notice("(no answer: the question is dropped)")
        return is_complete

    def run_command(self, name: str, argument: str) -> None:
        """Run the command `/name argument`."""
        match name:
            case "/help" | "/?":
                notice(HELP)
            case "/reset" | "/clear":
                self.turns, self.number = [], self.transcript.new_conversation()
                notice("(conversation cleared)")
            case "/system":
                self.system = argument or self.first_system
                removed = "removed" if self.first_system is None else "restored"
                notice(f"(system prompt {'set' if argument else removed})")
            case "/stats":
                notice(f"({self.answer.statistics() if self.answer else 'no answer yet'})")
            case "/save":
                self.save(argument)
            case _:
                raise UserError(f"{name} is not a command; /help lists them")

    def save(self, path: str) -> None:
        """Write the conversation as a dataset of one row. Other files are not overwritten."""
        if not path:
            raise UserError("/save needs the name of a file")
        if not self.turns:
            raise UserError("there is nothing to save yet")
        path = os.path.expanduser(path)
        row = {"messages": self._with_system(self.turns)}
        if os.path.lexists(path) and path not in self.saved_paths:
            raise UserError(f"{path} exists; choose another name")
        try:
            write_json([row], path)
        except (UserError, ValueError) as error:
            raise UserError(f"{error}; choose another name") from error
        self.saved_paths.add(path)
        notice(f"({len(self.turns)} messages saved to {path})")

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


def converse(conversation: Conversation) -> int:
    """Read and answer lines until the input ends; returns the exit status.

    An error does not end the conversation. Without a terminal it may go unread, so the status is
    FAILED, and Ctrl-C ends the conversation.
    """
    status, was_interrupted, is_terminal = 0, False, sys.stdin.isatty()
    if is_terminal:
        notice(f"{conversation.assistant.description} · /help lists the commands, /quit leaves")
    while True:
        try:
            line = read_line()
            was_interrupted = False
            if line is None:
                return status
            name, argument = split_command(line)
            if name[1:] in LEAVING_WORDS:
                return status
            if line.rstrip().lower() in LEAVING_WORDS:
                word = line.rstrip()
                if is_terminal:
                    notice(f'(left; begin the line with a space to say "{word}" to the model)')
                    return status
                notice(f'(through a pipe, "{word}" is a message to the model; /quit leaves)')
            if name:
                conversation.run_command(name, argument)
            elif line.strip():
                is_complete = conversation.ask(line)
                if not is_complete and not is_terminal:
                    return INTERRUPTED
        except (UserError, RuntimeError) as error:  # the model may run out of memory
            notice(f"error: {error}")
            status = 0 if is_terminal else FAILED
        except KeyboardInterrupt:
            if was_interrupted or not is_terminal:
                print(file=sys.stderr)
                return 0 if is_terminal else INTERRUPTED
            was_interrupted = True
            notice("\n(Ctrl-C again leaves; so does /quit)")


def read_line() -> str | None:
    """The next line of input, without its end; None at the end of the input."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if sys.stdin.isatty():  # input() would print its prompt to the file of the answers
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.removeprefix(BYTE_ORDER_MARK).rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # gives input() editing and history; not on every system

        # Pasted text is one message, even if it has several lines.
        readline.parse_and_bind("set enable-bracketed-paste on")
    # \001 and \002 tell readline which characters of the prompt have no width.
    prompt = "\001\033[1;32m\002>\001\033[0m\002 " if has_colours(sys.stdout) else "> "
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


def split_command(line: str) -> tuple[str, str]:
    """("/word", the rest of the line) for a command, ("", line) for a message.

    Only ASCII letters, and `/?`, make a command: `/etc/hosts is missing` and `/你好` are messages.
    """
    word, *rest = line.split(maxsplit=1) or [""]  # splits at the wide space of Chinese input too
    if word == "/?" or (word.startswith("/") and word.isascii() and word[1:].isalpha()):
        return word, rest[0].strip() if rest else ""
    return "", line


def show_pieces(pieces: Iterable[str], answer: Answer) -> None:
    """Print an answer while it is written; on a terminal, its thoughts too, dimmed."""
    num_shown = 0
    for piece in pieces:
        thoughts = answer.reasoning_content[num_shown:]
        if sys.stdout.isatty():
            if thoughts:
                print(dimmed(printable(thoughts), sys.stdout), end="", flush=True)
                num_shown += len(thoughts)
            if piece and num_shown and piece == answer.text:
                print("\n")  # between thoughts and answer
        print(printable(piece), end="", flush=True)


def printable(text: str) -> str:
    """The text without characters that a terminal would obey; unchanged for a file.

    These are the control characters, and those that turn the direction of the text around them.
    """
    if not sys.stdout.isatty():
        return text
    return "".join(
        char
        for char in text
        if char in "\n\t" or char.isprintable() or char > "\x9f" and char not in DIRECTIONS
    )


def notice(text: str) -> None:
    """Print a line that is not part of an answer."""
    print(dimmed(text, sys.stderr), file=sys.stderr, flush=True)


def dimmed(text: str, stream: TextIO) -> str:
    """The text in the dim colour of a terminal."""
    return f"\033[2m{text}\033[0m" if has_colours(stream) else text
