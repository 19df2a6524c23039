"""The web page of chat.py: the views of page.py in a browser, with gradio.

    page = Page([Assistant("examples/base", adapter="runs/demo")], Sampling(), system="Be brief.")
    serve(page, "127.0.0.1", 7860)

Neither the server nor the browser contacts another machine.
"""

import atexit
import hmac
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from minisft.chat.guards import Arrivals, Failures, Logins, Policy, arrival, log_refusal
from minisft.chat.markup import JOINER
from minisft.chat.page import MAX_SESSIONS, Page, Session, View
from minisft.common.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_ANSWERS = 8  # answers in progress at a time; other visitors wait in the queue
QUEUE_SIZE = 64
END_SECONDS = 1.0
MAX_VISITOR = 100  # characters of a visitor's name; VISITOR makes fewer
# Download a text as a file.
SAVE = """(text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
}"""
# A random name for the visitor, which others cannot guess. It survives a reload of the tab.
VISITOR = """() => sessionStorage.visitor ||=
    Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-")"""
# Copy text without the joiners of markup.py.
COPIES = """() => {
    const original = text => text.replaceAll("JOINER", ""), clipboard = navigator.clipboard;
    if (clipboard) {
        const write = clipboard.writeText.bind(clipboard);
        clipboard.writeText = text => write(original(text));
    }
    document.addEventListener("copy", event => {
        const text = getSelection().toString();
        if (original(text) !== text) {
            event.clipboardData.setData("text/plain", original(text));
            event.preventDefault();
        }
    });
}""".replace("JOINER", JOINER)


def check_gradio() -> None:
    """Raise UserError if gradio is not installed."""
    if find_spec("gradio") is None:
        raise UserError(
            "--web needs gradio, which is not installed: pip install -r requirements/web.txt"
        )


def build(page: Page) -> Any:
    """The gradio Blocks of a Page."""
    import gradio as gr

    return Interface(gr, page).blocks


class Interface:
    """`blocks`: the gradio components of a Page. The methods handle their events.

    A handler returns or yields the new values of `outputs`: chats, notice, text of the box.
    gr: the module gradio, which is optional.
    """

    def __init__(self, gr: Any, page: Page):
        self.gr, self.page = gr, page
        names = " beside ".join(assistant.name for assistant in page.assistants)
        Blocks = blocks_with_short_errors(gr)
        with Blocks(title=f"minisft · {names}", analytics_enabled=False) as self.blocks:
            self.session = gr.State(Session())
            with gr.Row():
                self.chats = [
                    gr.Chatbot(
                        label=assistant.description,
                        height="62vh",
                        editable="user",
                        sanitize_html=True,
                        allow_tags=False,
                        buttons=["copy"],
                        elem_id=f"chat{place}",
                    )
                    for place, assistant in enumerate(page.assistants)
                ]
            self.notice = gr.Markdown(elem_id="notice", container=False)
            self.box = gr.Textbox(
                placeholder="Ask something",
                show_label=False,
                lines=1,
                max_lines=12,
                interactive=False,  # until the session is loaded
                submit_btn=True,
                elem_id="box",
            )
            with gr.Row():
                self.stop_button, self.retry_button, self.clear_button, self.download_button = (
                    # Narrow enough for a phone to show them in one row.
                    gr.Button(label, elem_id=label.lower(), size="sm", min_width=60)
                    for label in ("Stop", "Retry", "Clear", "Download")
                )
            self.controls = _controls(gr, page)
            self.outputs = [*self.chats, self.notice, self.box]
            self._connect_answers()
            self._connect_others()

    def _connect_answers(self) -> None:
        """The events that a model answers."""
        # gradio passes event and request to the arguments with these hints.
        EditData, Request = self.gr.EditData, self.gr.Request

        def ask(
            request: Request, session: Session, question: str, *values: Any
        ) -> Iterator[list[Any]]:
            """Answer the question in the box."""
            views = self.page.ask(session, question, *values, sent_at=arrival(request))
            yield from map(self.values, views)

        def retry(request: Request, session: Session, *values: Any) -> Iterator[list[Any]]:
            """Answer the last question again."""
            views = self.page.retry(session, *values, sent_at=arrival(request))
            yield from map(self.values, views)

        def edit_in(place: int) -> Callable[..., Iterator[list[Any]]]:
            """The handler of edits in the chat at `place`."""

            def edit(
                event: EditData, request: Request, session: Session, *values: Any
            ) -> Iterator[list[Any]]:
                """Answer a question that was edited."""
                index, question = (getattr(event, name, None) for name in ("index", "value"))
                if type(index) is not int or not isinstance(question, str):
                    raise self.gr.Error("not an edit of a message", print_exception=False)
                views = self.page.edit(
                    session, index, question, *values, place=place, sent_at=arrival(request)
                )
                yield from map(self.values, views)

            return edit

        assistants = self.page.assistants
        # An answer of a compiled model takes a cache with the memory of the longest conversation.
        limits = [assistant.caches.limit for assistant in assistants if assistant.decoder]
        answering: dict[str, Any] = {
            "outputs": self.outputs,
            "concurrency_limit": min([MAX_ANSWERS, *limits]),
            "concurrency_id": "answers",
            "show_progress": "minimal",
        }
        asked = [self.session, self.box, *self.controls]
        self.box.submit(ask, asked, api_name="ask", **answering)
        again = [self.session, *self.controls]
        self.retry_button.click(retry, again, api_name="retry", **answering)
        for place, chat in enumerate(self.chats):
            chat.edit(edit_in(place), again, **answering)

    def _connect_others(self) -> None:
        """The events that need no model, which do not wait in the queue."""
        self.stop_button.click(self.page.stop, self.session, None, api_name="stop", queue=False)
        # Without this, the bin icon of a Chatbot would only clear the view.
        clearing = [self.clear_button.click, *(chat.clear for chat in self.chats)]
        self.gr.on(clearing, self.clear, self.session, self.outputs, api_name="clear", queue=False)
        exported, visitor = (self.gr.Textbox(visible=False) for _ in range(2))
        self.download_button.click(
            self.export, self.session, [exported, self.notice], api_name="export", queue=False
        ).then(None, exported, None, js=SAVE)
        self.blocks.load(
            self.load_session,
            visitor,
            [self.session, self.box, *self.chats],
            js=VISITOR,
            queue=False,
            api_visibility="private",
        )

    def values(self, view: View) -> list[Any]:
        """The values of `outputs` that show a view."""
        chats, notice, text = view
        return [*chats, notice, self.gr.skip() if text is None else text]

    def clear(self, session: Session) -> list[Any]:
        """Forget the conversation."""
        return self.values(self.page.clear(session))

    def export(self, session: Session) -> tuple[str, Any]:
        """(the conversation as JSON, a notice if there is none)."""
        text = self.page.export(session)
        return text, self.gr.skip() if text else "There is nothing to download yet."

    def load_session(self, visitor: str) -> list[Any]:
        """The session of a visitor who loads the page, the open box, the messages of the chats.

        A question that is sent before would belong to no session, or be stopped with the answer
        that a reload stops.
        """
        if not visitor or len(visitor) > MAX_VISITOR:
            raise self.gr.Error("not the name of a visitor", print_exception=False)
        session = self.page.load_session(visitor)
        box = self.gr.Textbox(interactive=True, autofocus=True)
        return [session, box, *self.page.view(session, "")[0]]


def blocks_with_short_errors(gr: Any) -> Any:
    """The class gr.Blocks, but a malformed call is one line in the log, not a traceback."""

    class Blocks(gr.Blocks):
        """See above."""

        async def process_api(self, block_fn: Any, *arguments: Any, **more: Any) -> Any:
            """The result of an event, or of the next step of its handler."""
            try:
                return await super().process_api(block_fn, *arguments, **more)
            except Exception as error:
                reason = log_refusal(f"a call of {block_fn.api_name}", error)
                raise gr.Error(reason, print_exception=False) from None

    return Blocks


def _controls(gr: Any, page: Page) -> list[Any]:
    """The components for the system prompt and the fields of Sampling, in their order."""
    sampling = page.sampling
    longest = max(assistant.max_length for assistant in page.assistants)

    def slider(label: str, lowest: float, highest: float, value: float, **more: Any) -> Any:
        """A slider whose range includes the value, which the command line may have set."""
        lowest, highest = min(lowest, value), max(highest, value)
        return gr.Slider(lowest, highest, value, label=label, min_width=200, **more)

    with gr.Accordion("System prompt and sampling", open=False):
        system = gr.Textbox(
            page.system, label="System prompt", lines=2, max_lines=12, elem_id="system"
        )
        with gr.Row():
            return [
                system,
                slider("Longest answer", 1, longest, min(sampling.max_new_tokens, longest), step=1),
                slider("Temperature", 0, 2, sampling.temperature),
                slider("Top k (0: all)", 0, 200, sampling.top_k, step=1),
                slider("Top p (1: all)", 0.01, 1, sampling.top_p),
                slider("Repetition penalty", 0.5, 2, sampling.repetition_penalty),
                gr.Checkbox(sampling.greedy, label="Greedy"),
                # A Textbox, because an empty gr.Number is 0.
                gr.Textbox(
                    "" if sampling.seed is None else str(sampling.seed),
                    elem_id="seed",
                    label="Seed (empty: different each time)",
                ),
            ]


def launch(
    page: Page, host: str, port: int, password: str | None = None, share: bool = False
) -> Any:
    """Start a server in the background; returns the gradio Blocks, whose close() ends it."""
    # Set before gradio is imported: otherwise gradio asks its makers' server for the newest
    # version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Its statistics of calls would fail for all after a session named by half a surrogate pair.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**12)
    # Otherwise each wrong password could come with another address. Name a proxy of your own here.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def is_password(name: str, given: str) -> bool:
        """True if a visitor has given the password; the name does not matter."""
        # compare_digest takes the same time however much of it is right.
        # A form can carry half of a surrogate pair, and so can a command line.
        first, second = (text.encode(errors="surrogatepass") for text in (given, password or ""))
        return hmac.compare_digest(first, second)

    middleware = [Middleware(Policy), Middleware(Failures), Middleware(Arrivals)]
    if password:
        middleware.append(Middleware(Logins))
    if host in LOOPBACK and not share:
        # Otherwise another site could point its domain name to this machine and read the page.
        hosts = [*LOOPBACK, "[::1]"]
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts))
    # Otherwise a call could skip the queue, and so the limit of answers at a time.
    blocks = build(page).queue(max_size=QUEUE_SIZE, api_open=False)
    try:
        # gradio would wait five seconds for a server that cannot start.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
        blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            footer_links=[],
            auth=is_password if password else None,
            auth_message="Any user name works.",
            app_kwargs={"middleware": middleware},
            prevent_thread_lock=True,
            js=COPIES,
            state_session_capacity=MAX_SESSIONS,
            max_file_size=1,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
        )
    except OSError as error:
        raise UserError(
            f"--server_port {port} cannot be opened on {host}: the port is in use, or the address "
            "is not this machine's. Choose another --server_port or --server_name."
        ) from error
    return blocks


def serve(
    page: Page, host: str, port: int, password: str | None = None, share: bool = False
) -> None:
    """Serve a Page until Ctrl-C or SIGTERM; then end the process.

    Answers in progress and open connections have END_SECONDS to end.
    """
    blocks = launch(page, host, port, password, share)
    if not password and (host not in LOOPBACK or share):
        print(
            "Everyone who can reach this machine can use the page. Consider --password.",
            file=sys.stderr,
        )
    try:
        print(f"{blocks.share_url or blocks.local_url}  (Ctrl-C ends)", file=sys.stderr, flush=True)
        threading.Event().wait()
    except (KeyboardInterrupt, SystemExit):
        # Answers end after the token they are at. A long prompt may take far longer.
        page.close()
        closing = threading.Thread(target=blocks.close, args=(False,), daemon=True)
        closing.start()
        closing.join(END_SECONDS)
        # The interpreter would wait for answers, then take apart torch and gradio.
        atexit._run_exitfuncs()  # removes temporary files, and ends the tunnel of --share
        os._exit(0)
