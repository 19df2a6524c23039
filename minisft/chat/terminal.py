"""A conversation at a terminal, or line by line through a pipe.

    conversation = Conversation(system="Be brief.")
    conversation.ask("What is 2 + 2?", assistant, Sampling(greedy=True))
    converse(conversation, assistant, Sampling())       # until the input ends

Answers go to standard output, everything else to standard error.
"""

import contextlib
import json
import os
import sys

from minisft.chat.transcript import Transcript
from minisft.common.errors import UserError

FAILED = 2  # exit status, as after any mistake
INTERRUPTED = 130  # as a shell has it: 128 + SIGINT
BYTE_ORDER_MARK = "\ufeff"  # what some editors begin a file with
HELP = """\
/reset          forget the conversation (the system prompt stays)
/system TEXT    set the system prompt; without TEXT, as it was in the beginning
/save FILE      write the conversation as JSON that train.py reads
/stats          how fast the last answer came
/help           this list
/quit           leave (Ctrl-D does too)
Ctrl-C stops an answer."""


def converse(conversation, assistant, sampling):
    """Read and answer until the end of the input -> exit status.

    An error ends no conversation. Without a terminal, where it may be that nobody has read of it,
    the status is FAILED after one, and Ctrl-C ends the whole with INTERRUPTED.
    """
    interrupted, status, by_hand = False, 0, sys.stdin.isatty()
    while True:
        try:
            line = read_line()
            interrupted = False
            name, argument = split_command(line or "")
            if line is None or name == "/quit":
                return status
            if name:
                conversation.command(name, argument)
            elif line.strip() and not conversation.ask(line, assistant, sampling) and not by_hand:
                return INTERRUPTED
        except (UserError, RuntimeError) as error:
            # Of the model too, such as memory that does not suffice.
            notice(f"error: {error}")
            status = 0 if by_hand else FAILED
        except KeyboardInterrupt:
            if interrupted or not by_hand:
                print(file=sys.stderr)
                return 0 if by_hand else INTERRUPTED
            interrupted = True
            notice("\n(Ctrl-C again leaves; so does /quit)")


def read_line():
    """The next line of input, or None at its end."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if sys.stdin.isatty():  # the answers go to a file, into which input() would prompt
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.removeprefix(BYTE_ORDER_MARK).rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # gives input() editing and history

        # What is pasted is one message, however many lines it has.
        readline.parse_and_bind("set enable-bracketed-paste on")
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
    """What was said, under which system prompt, and what is done with it."""

    def __init__(self, system=None, transcript=None):
        self.standing, self.system, self.transcript = system, system, transcript or Transcript()
        self.turns, self.saved_to = [], set()
        self.number, self.logged_system = 1, None  # of this conversation in the transcript
        self.answer = None  # the last one

    def messages(self, turns):
        """`turns` behind the system prompt, if there is one."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + turns

    def ask(self, question, assistant, sampling):
        """Stream the answer to standard output and keep both; True if it came to its end.

        Ctrl-C keeps what has come, or nothing of the turn if nothing has.
        """
        turns = self.turns + [{"role": "user", "content": question}]
        self.answer = answer = assistant.stream(
            self.messages(turns), sampling, say=lambda text: notice(f"({text})")
        )
        complete = False
        try:
            with contextlib.closing(self._logged(question, answer)) as pieces:
                for piece in pieces:
                    print(shown(piece), end="", flush=True)
            print()
            if answer.cut_short:
                notice("(cut: the answer has used up the room it had)")
            complete = True
        except KeyboardInterrupt:
            notice("\n(stopped)")
        finally:
            answer.close()
            # A turn without words could not be learned from: it is no part of what /save writes.
            if answer.text.strip():
                self.turns = turns + [{"role": "assistant", "content": answer.text}]
        if complete and not answer.text.strip():
            notice("(no answer: the question is not remembered)")
        return complete

    def _logged(self, question, answer):
        """The pieces of the answer, with all of the turn in the transcript."""
        if self.system != self.logged_system:
            self.transcript.write(self.number, "system", self.system or "")
            self.logged_system = self.system
        self.transcript.write(self.number, "user", question)
        return self.transcript.follow(self.number, answer)

    def command(self, name, argument):
        """Carry out `/name argument`; UserError if there is no such command."""
        if name == "/help":
            notice(HELP)
        elif name == "/reset":
            self.turns = []
            self.number, self.logged_system = self.number + 1, None
            notice("(forgotten)")
        elif name == "/system":
            self.system = argument or self.standing
            removed = "removed" if self.standing is None else "as in the beginning"
            notice(f"(system prompt {'set' if argument else removed})")
        elif name == "/stats":
            notice(f"({self.answer.figures() if self.answer else 'no answer yet'})")
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
