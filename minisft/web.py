"""A page to chat on: what is said and answered is in Page, how it looks is gradio's.

    page = Page([Assistant("examples/base", adapter="runs/demo")], Sampling(), system="Be brief.")
    serve(page, "127.0.0.1", 7860)

Each visitor has a Talk on the server, of which the browser shows a picture: an error, or a page
that is closed, loses none of it. Nothing is asked of other machines, by the server or the browser.
"""

import hmac
import json
import os
import re
import sys
import threading
import time
import traceback
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count, zip_longest

from minisft.generate import Sampling
from minisft.options import UserError
from minisft.transcript import Transcript

AT_ONCE = 8  # answers that are written at the same time; other visitors wait in the queue
QUEUE_SIZE = 64
SECONDS_BETWEEN_VIEWS = 0.05
# Blocks between fences (an open one goes to the end) and code between backticks.
CODE = re.compile(r"(^[ \t>]*(?P<fence>`{3,}|~{3,})[\s\S]*?(?:^[ \t>]*(?P=fence)[`~]*[ \t]*$|\Z)"
                  r"|(?P<ticks>(?<!`)`+(?!`))[^\n]+?(?<!`)(?P=ticks)(?!`))", re.MULTILINE)
# The browser's part of the promise: it loads and sends nothing from or to elsewhere, whatever an
# answer says. What is inline is gradio's own.
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
          "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
          "connect-src 'self'; frame-src 'none'; object-src 'none'; base-uri 'self'; "
          "form-action 'self'; frame-ancestors 'self'")
SAVE = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
}"""


@dataclass
class Turn:
    """A question and what each model has answered so far."""

    question: str
    answers: list


@dataclass
class Talk:
    """The conversation of one visitor, with each of the models."""

    turns: list = field(default_factory=list)
    number: int = 0  # in the transcript, from 1; 0 before there is anything to write
    system: str = ""
    busy: bool = False
    stopping: bool = False


class Page:
    """One or two Assistants and what visitors can do with them.

    The methods that answer are generators of (chats, notice, box): for each model its messages as
    gradio's Chatbot takes them, a line of Markdown, and the text for the question's box (None: as
    it is). They show errors instead of raising them.
    """

    def __init__(self, assistants, sampling, system="", transcript=None):
        self.assistants, self.sampling, self.system = assistants, sampling, system
        self.transcript, self.numbers = transcript or Transcript(), count(1)

    def ask(self, talk, question, system, *sampling):
        """Answer a question; sampling: the fields of Sampling in their order."""
        return self._answer(talk, talk.turns, question, system, sampling)

    def retry(self, talk, system, *sampling):
        """Answer the last question again."""
        if not talk.turns:
            return iter([self.view(talk, "There is no answer yet to do again.")])
        *earlier, last = talk.turns
        return self._answer(talk, earlier, last.question, system, sampling, box=None)

    def edit(self, talk, index, question, system, *sampling):
        """Ask another question in place of message `index`; what came after it goes."""
        return self._answer(talk, talk.turns[: index // 2], question, system, sampling, box=None)

    def stop(self, talk):
        """End the answer that is being written; what has come of it stays."""
        talk.stopping = True

    def clear(self, talk):
        """Forget the conversation -> (chats, notice, box)."""
        talk.turns, talk.number, talk.system = [], 0, ""
        return self.view(talk, "")

    def export(self, talk):
        """The conversation as JSON that train.py reads, a row for each model."""
        rows = [{"model": one.name, "messages": self._messages(talk.turns, place, talk.system)}
                for place, one in enumerate(self.assistants)]
        return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"

    def view(self, talk, notice, box=None):
        """(chats, notice, box) of what has been said."""
        chats = [[message for turn in talk.turns for message in (
                    {"role": "user", "content": shown(turn.question)},
                    {"role": "assistant", "content": shown(turn.answers[place]) or "…"})]
                 for place in range(len(self.assistants))]
        return chats, notice, box

    def _messages(self, turns, place, system):
        """The conversation with the model at `place`; a question it left unanswered is left out."""
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for turn in turns:
            if turn.answers[place].strip():
                messages += [{"role": "user", "content": turn.question},
                             {"role": "assistant", "content": turn.answers[place]}]
        return messages

    def _answer(self, talk, earlier, question, system, sampling, box=""):
        """Answer `question` after the turns `earlier`; they replace the talk's once it begins."""
        refused = question if box == "" else None  # a question that was typed is given back
        if talk.busy:
            yield self.view(talk, "An answer is still being written: stop it first.", refused)
            return
        talk.busy, talk.stopping, before, notes = True, False, talk.turns, []
        turn = Turn(question, [""] * len(self.assistants))
        turns = talk.turns = [*earlier, turn]
        try:
            with ExitStack() as stack:
                answers = self._begin(earlier, turn, system, sampling, notes)
                talk.system = system
                pieces = [stack.enter_context(closing(one))
                          for one in self._logged(talk, question, answers)]
                yield self.view(talk, " ".join(notes), box)
                yield from self._follow(talk, turns, pieces, answers, notes)
            notes += [self._figures(answers)]
        except UserError as error:
            notes += [f"**{shown(str(error))}**"]
        except Exception as error:  # of the model: the page lives on, the server's log tells where
            traceback.print_exc()
            notes += [f"**The model failed: {shown(str(error)) or type(error).__name__}** "
                      "The conversation is kept; try again."]
        finally:
            talk.busy = False
            empty = not any(answer.strip() for answer in turn.answers)
            if empty and talk.turns is turns:  # else it has been cleared meanwhile
                talk.turns = before
        yield self.view(talk, " ".join(notes), refused if empty else None)

    def _begin(self, earlier, turn, system, sampling, notes):
        """An Answer from each model; UserError for what cannot be asked."""
        max_new_tokens, temperature, top_k, top_p, penalty, greedy, seed = sampling
        sampling = Sampling(int(max_new_tokens), temperature, int(top_k), top_p, penalty, greedy,
                            seed_of(seed))
        question = {"role": "user", "content": turn.question}
        return [assistant.stream([*self._messages(earlier, place, system), question], sampling,
                                 say=lambda text: notes.append(f"{text.capitalize()}."))
                for place, assistant in enumerate(self.assistants)]

    def _logged(self, talk, question, answers):
        """The pieces of the answers, with all of the turn in the transcript."""
        talk.number = talk.number or next(self.numbers)
        self.transcript.write(talk.number, "system", talk.system)
        self.transcript.write(talk.number, "user", question)
        return [self.transcript.follow(talk.number, answer, model=assistant.name)
                for assistant, answer in zip(self.assistants, answers, strict=True)]

    def _follow(self, talk, turns, pieces, answers, notes):
        """Write all answers side by side, a token of each at a time, and show them as they grow."""
        shown_at = 0.0
        for _ in zip_longest(*pieces):
            turns[-1].answers = [answer.text for answer in answers]
            if talk.stopping or talk.turns is not turns:
                notes.append("Stopped.")
                return
            if time.monotonic() - shown_at > SECONDS_BETWEEN_VIEWS:
                yield self.view(talk, " ".join(notes))
                shown_at = time.monotonic()

    def _figures(self, answers):
        """How fast the answers came, and why they ended if it was not by themselves."""
        parts = []
        for assistant, answer in zip(self.assistants, answers, strict=True):
            name = f"{shown(assistant.name)}: " if len(answers) > 1 else ""
            cut = ", cut because the room for it was used up" if answer.cut_short else ""
            parts.append(name + answer.figures() + cut)
        return " · ".join(parts)


def seed_of(text):
    """The seed that a visitor has typed, None for an empty field."""
    try:
        return int(text) if text and text.strip() else None
    except ValueError as error:
        raise UserError(f"the seed must be a whole number or empty, not '{text}'") from error


def shown(text):
    """Text of anyone as Markdown that is only read: tags stand as they are, images are links.

    What is code needs no escape. The page's sanitizer and POLICY stand behind this.
    """
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [_escaped(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join(parts) + _escaped(text[end:])


def _escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\u200b[")


class Policy:
    """ASGI middleware: every response tells the browser the POLICY."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def check_gradio():
    """UserError where gradio is not installed."""
    if find_spec("gradio") is None:
        raise UserError("--web needs gradio, which is not installed: "
                        "pip install -r requirements-extras.txt")


def build(page):
    """The gradio Blocks of a Page."""
    import gradio as gr

    names = " beside ".join(assistant.name for assistant in page.assistants)
    with gr.Blocks(title=f"minisft · {names}", analytics_enabled=False) as blocks:
        talk = gr.State(Talk())
        with gr.Row():
            chats = [gr.Chatbot(label=assistant.description, height="62vh", editable="user",
                                sanitize_html=True, allow_tags=False, buttons=["copy"],
                                elem_id=f"chat{place}")
                     for place, assistant in enumerate(page.assistants)]
        notice = gr.Markdown(elem_id="notice", container=False)
        box = gr.Textbox(placeholder="Ask something", show_label=False, lines=1, max_lines=12,
                         autofocus=True, submit_btn=True, elem_id="box")
        with gr.Row():
            stop, retry, clear, download = (
                gr.Button(label, elem_id=label.lower(), size="sm")
                for label in ("Stop", "Retry", "Clear", "Download"))
        controls = _controls(gr, page)
        saved = gr.Textbox(visible=False)
        _connect(gr, page, talk, chats, notice, box, controls,
                 {"stop": stop, "retry": retry, "clear": clear})
        download.click(page.export, talk, saved, queue=False).then(None, saved, None, js=SAVE)
    return blocks


def _controls(gr, page):
    """The components of system prompt and sampling, in the order in which handlers take them."""
    sampling = page.sampling
    longest = max(assistant.max_length for assistant in page.assistants)
    with gr.Accordion("System prompt and sampling", open=False):
        system = gr.Textbox(page.system, label="System prompt", lines=2, max_lines=12,
                            elem_id="system")
        with gr.Row():
            return [
                system,
                gr.Slider(1, longest, sampling.max_new_tokens, step=1, label="Longest answer",
                          min_width=200),
                gr.Slider(0, 2, sampling.temperature, label="Temperature", min_width=200),
                gr.Slider(0, 200, sampling.top_k, step=1, label="Top k (0: all)", min_width=200),
                gr.Slider(0.01, 1, sampling.top_p, label="Top p (1: all)", min_width=200),
                gr.Slider(0.5, 2, sampling.repetition_penalty, label="Repetition penalty",
                          min_width=200),
                gr.Checkbox(sampling.greedy, label="Greedy"),
                # A Textbox, since a Number that is left empty says 0.
                gr.Textbox("" if sampling.seed is None else str(sampling.seed), elem_id="seed",
                           label="Seed (empty: different each time)"),
            ]


def _connect(gr, page, talk, chats, notice, box, controls, buttons):
    """Tie what visitors do to the methods of the Page."""
    outputs = [*chats, notice, box]

    def flat(view):
        columns, said, text = view
        return [*columns, said, gr.skip() if text is None else text]

    def ask(talk, question, *values):
        yield from map(flat, page.ask(talk, question, *values))

    def retry(talk, *values):
        yield from map(flat, page.retry(talk, *values))

    def edit(event: gr.EditData, talk, *values):
        yield from map(flat, page.edit(talk, event.index, event.value, *values))

    answering = {"outputs": outputs, "concurrency_limit": AT_ONCE, "concurrency_id": "answers",
                 "show_progress": "minimal"}
    box.submit(ask, [talk, box, *controls], api_name="ask", **answering)
    buttons["retry"].click(retry, [talk, *controls], api_name="retry", **answering)
    for chat in chats:
        chat.edit(edit, [talk, *controls], **answering)
    buttons["stop"].click(page.stop, talk, None, api_name="stop", queue=False)
    # The Chatbot's own bin empties what is shown: it means the conversation, as the button does.
    gr.on([buttons["clear"].click, *(chat.clear for chat in chats)],
          lambda talk: flat(page.clear(talk)), talk, outputs, api_name="clear", queue=False)


def launch(page, host, port, password=None, share=False):
    """Start to serve a Page; returns the gradio Blocks, of which `close()` ends it."""
    # Before gradio is imported: it asks its makers' server for its newest version otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from starlette.middleware import Middleware

    def knows_password(name, given):
        return hmac.compare_digest(given.encode(), password.encode())

    blocks = build(page).queue(max_size=QUEUE_SIZE)
    try:
        blocks.launch(
            server_name=host, server_port=port, share=share, quiet=True, footer_links=[],
            auth=knows_password if password else None, auth_message="Any name will do.",
            app_kwargs={"middleware": [Middleware(Policy)]}, prevent_thread_lock=True,
            max_file_size=1, ssr_mode=False, mcp_server=False, pwa=False, run_history=False,
        )
    except OSError as error:
        raise UserError(f"--server_port {port}: cannot be served at on {host} ({error}); choose "
                        "another") from error
    return blocks


def serve(page, host, port, password=None, share=False):
    """Serve a Page until Ctrl-C."""
    blocks = launch(page, host, port, password, share)
    open_to_all = host not in ("127.0.0.1", "localhost", "::1") or share
    if open_to_all and not password:
        print("anyone who can reach this machine can use the page: consider --password",
              file=sys.stderr)
    print(f"{blocks.share_url or blocks.local_url}  (Ctrl-C ends)", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        blocks.close(verbose=False)
