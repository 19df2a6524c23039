"""The page of chat.py: how what page.py does looks in a browser, with gradio.

    page = Page([Assistant("examples/base", adapter="runs/demo")], Sampling(), system="Be brief.")
    serve(page, "127.0.0.1", 7860)

Nothing is asked of other machines, by the server or by the browser.
"""

import hmac
import os
import sys
import threading
from importlib.util import find_spec

from minisft.chat.page import JOINER, Talk
from minisft.common.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_REQUEST = 32 * 2**20  # bytes
AT_ONCE = 8  # answers that are written at the same time; other visitors wait in the queue
QUEUE_SIZE = 64
# The browser's part of the promise: it loads and sends nothing from or to elsewhere, whatever an
# answer says. What is inline is gradio's own.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; frame-src 'none'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
SAVE = """(text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
}"""
# A name that this tab keeps when the page is loaded again, and that nobody can guess.
VISITOR = """() => sessionStorage.visitor ||=
    Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-")"""
# What is copied from the page is what was said, without the joiners of page.shown.
COPIES = """() => {
    const said = text => text.replaceAll("JOINER", ""), clipboard = navigator.clipboard;
    if (clipboard) {
        const write = clipboard.writeText.bind(clipboard);
        clipboard.writeText = text => write(said(text));
    }
    document.addEventListener("copy", event => {
        const text = getSelection().toString();
        if (said(text) !== text) {
            event.clipboardData.setData("text/plain", said(text));
            event.preventDefault();
        }
    });
}""".replace("JOINER", JOINER)


class Policy:
    """ASGI middleware: every response tells the browser the POLICY; no request is too large."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        """Hand a request to the app, or refuse it."""

        async def send_with_policy(message):
            """Send the app's message, the POLICY among its headers."""
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        headers = dict(scope.get("headers", ()))
        size = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or int(size) > LARGEST_REQUEST:
            await send_with_policy({"type": "http.response.start", "status": 413})
            await send({"type": "http.response.body", "body": b"The request is too large."})
        else:
            await self.app(scope, receive, send_with_policy)


def check_gradio():
    """UserError where gradio is not installed."""
    if find_spec("gradio") is None:
        raise UserError(
            "--web needs gradio, which is not installed: pip install -r requirements-extras.txt"
        )


def build(page):
    """The gradio Blocks of a Page."""
    import gradio as gr

    names = " beside ".join(assistant.name for assistant in page.assistants)
    with gr.Blocks(title=f"minisft · {names}", analytics_enabled=False) as blocks:
        talk = gr.State(Talk())
        with gr.Row():
            chats = [
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
        notice = gr.Markdown(elem_id="notice", container=False)
        box = gr.Textbox(
            placeholder="Ask something",
            show_label=False,
            lines=1,
            max_lines=12,
            autofocus=True,
            submit_btn=True,
            elem_id="box",
        )
        with gr.Row():
            stop, retry, clear, download = (
                # Narrow enough for a phone to have all of them in a row.
                gr.Button(label, elem_id=label.lower(), size="sm", min_width=60)
                for label in ("Stop", "Retry", "Clear", "Download")
            )
        controls = _controls(gr, page)
        _connect(
            gr,
            page,
            talk,
            chats,
            notice,
            box,
            controls,
            {"stop": stop, "retry": retry, "clear": clear},
        )
        _keep(gr, page, talk, chats, notice, download, blocks)
    return blocks


def _controls(gr, page):
    """The components of system prompt and sampling, in the order in which handlers take them."""
    sampling = page.sampling
    longest = max(assistant.max_length for assistant in page.assistants)

    def slider(label, lowest, highest, value, **more):
        """A slider that reaches to the value of the command line, wherever that is."""
        return gr.Slider(
            min(lowest, value), max(highest, value), value, label=label, min_width=200, **more
        )

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
                # A Textbox, since a Number that is left empty says 0.
                gr.Textbox(
                    "" if sampling.seed is None else str(sampling.seed),
                    elem_id="seed",
                    label="Seed (empty: different each time)",
                ),
            ]


def _connect(gr, page, talk, chats, notice, box, controls, buttons):
    """Tie what visitors do to the methods of the Page."""
    outputs = [*chats, notice, box]

    def flat(view):
        """What a Page shows, as the values of the outputs."""
        columns, said, text = view
        return [*columns, said, gr.skip() if text is None else text]

    def ask(talk, question, *values):
        """The views of an answer to what was typed."""
        yield from map(flat, page.ask(talk, question, *values))

    def retry(talk, *values):
        """The views of another answer."""
        yield from map(flat, page.retry(talk, *values))

    def edit(event: gr.EditData, talk, *values):
        """The views of an answer to a question that was edited."""
        yield from map(flat, page.edit(talk, event.index, event.value, *values))

    # Each that is written by a compiled model takes the memory of a full context.
    limits = [assistant.caches.limit for assistant in page.assistants if assistant.decoder]
    answering = {
        "outputs": outputs,
        "concurrency_limit": min([AT_ONCE, *limits]),
        "concurrency_id": "answers",
        "show_progress": "minimal",
    }
    box.submit(ask, [talk, box, *controls], api_name="ask", **answering)
    buttons["retry"].click(retry, [talk, *controls], api_name="retry", **answering)
    for chat in chats:
        chat.edit(edit, [talk, *controls], **answering)
    buttons["stop"].click(page.stop, talk, None, api_name="stop", queue=False)
    # The Chatbot's own bin empties what is shown: it means the conversation, as the button does.
    gr.on(
        [buttons["clear"].click, *(chat.clear for chat in chats)],
        lambda talk: flat(page.clear(talk)),
        talk,
        outputs,
        api_name="clear",
        queue=False,
    )


def _keep(gr, page, talk, chats, notice, download, blocks):
    """Let visitors take their conversation along, and find it when they load the page again."""
    saved, visitor = gr.Textbox(visible=False), gr.Textbox(visible=False)

    def export(talk):
        """The conversation for SAVE, and what is said where there is none."""
        text = page.export(talk)
        return text, gr.skip() if text else "There is nothing to download yet."

    def come_back(visitor):
        """The conversation of someone who was here before, and what of it is shown."""
        talk = page.come_back(visitor)
        return talk, *page.view(talk, "")[0]

    download.click(export, talk, [saved, notice], api_name="export", queue=False).then(
        None, saved, None, js=SAVE
    )
    blocks.load(
        come_back, visitor, [talk, *chats], js=VISITOR, queue=False, api_visibility="private"
    )


def launch(page, host, port, password=None, share=False):
    """Start to serve a Page; returns the gradio Blocks, of which `close()` ends it."""
    # Before gradio is imported: it asks its makers' server for its newest version otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def knows_password(name, given):
        """Whether `given` is the password, in a time that does not tell how far it is right."""
        return hmac.compare_digest(given.encode(), password.encode())

    blocks, guards = build(page).queue(max_size=QUEUE_SIZE), [Middleware(Policy)]
    if host in LOOPBACK and not share:
        # Another site could give its own name this machine's address and so speak to the page.
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            footer_links=[],
            auth=knows_password if password else None,
            auth_message="Any name will do.",
            app_kwargs={"middleware": guards},
            prevent_thread_lock=True,
            js=COPIES,
            max_file_size=1,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
        )
    except OSError as error:
        raise UserError(
            f"--server_port {port}: cannot be served at on {host}: the port is in use, "
            "or the address is not this machine's; choose another port or "
            "--server_name"
        ) from error
    return blocks


def serve(page, host, port, password=None, share=False):
    """Serve a Page until Ctrl-C."""
    blocks = launch(page, host, port, password, share)
    open_to_all = host not in LOOPBACK or share
    if open_to_all and not password:
        print(
            "anyone who can reach this machine can use the page: consider --password",
            file=sys.stderr,
        )
    try:
        print(f"{blocks.share_url or blocks.local_url}  (Ctrl-C ends)", file=sys.stderr, flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        blocks.close(verbose=False)
