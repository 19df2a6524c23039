"""Where the text of a chat template comes from.

    get_template("auto", tokenizer)                     # the checkpoint's own
    get_template("alpaca", tokenizer)                   # ours: templates/alpaca.jinja
    get_template("my_template.jinja", tokenizer)        # a file
    trained_template("auto", tokenizer, "runs/cherry")  # what train.py has used

A system prompt and --template_kwargs become lines at the beginning of the text. So with the text of
a saved model, other programs write exactly the prompts of training.
"""

import json
import keyword
import re
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.common.llama_factory import TEMPLATES
from minisft.common.outputs import recorded_options
from minisft.text.chat_template import ChatTemplate
from minisft.text.render_process import MAX_TEMPLATE, Clock, environment
from minisft.text.rendering import TemplateError
from minisft.text.template_facts import ANSWER
from minisft.text.template_settings import setting, split_settings, system_setting, with_settings
from minisft.text.tokenizer import Tokenizer
from minisft.text.tokenizer_files import read_chat_template, read_template_file
from minisft.text.turn_tokens import BAICHUAN2, TURN_TOKENS
from minisft.text.turn_tokens import TEMPLATES as FOLDER

NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
JINJA_WORDS = ("true", "false", "none", "loop", "self", "super", "caller", "varargs", "kwargs")
# Variables that every template gets: the conversation, and transformers' and Jinja's functions.
ALREADY_SET = {"messages", "tools", "add_generation_prompt", *environment(Clock()).globals}
# Families of models after which LLaMA-Factory names templates: their checkpoints have their own.
FAMILIES = set(
    "baichuan bailing chatglm codegeex cohere deepseek exaone falcon gemma glm gpt granite hunyuan "
    "index intern internlm llama mimo minicpm ministral mistral openchat orion phi qwen qwq seed "
    "smollm solar starchat telechat tulu xverse yi yuan".split()
)
CHAT_TEMPLATE = "chat_template.jinja"  # the file in a folder that train.py writes


def get_template(
    name: str,
    tokenizer: Tokenizer,
    default_system: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    enable_thinking: bool | None = None,
    now: str | None = None,
    text: str | None = None,
) -> ChatTemplate:
    """The template `name`: "auto", one of NAMES, or the path of a Jinja file.

    default_system: the system prompt of conversations without one; "" for none, None for the
    template's own.
    template_kwargs: variables for the template. enable_thinking, now: see ChatTemplate. text: that
    of the template, if it is known. UserError for an unknown name, or if the template cannot
    express `default_system`.
    """
    text = template_text(name, tokenizer) if text is None else text
    if len(text) > MAX_TEMPLATE:
        raise UserError(f"template {name}: {len(text):,} characters; {MAX_TEMPLATE:,} is the limit")
    settings, template_kwargs = {}, template_kwargs or {}
    if enable_thinking is None:
        enable_thinking = template_kwargs.get("enable_thinking")
    if name in NAMES and tokenizer.leading_space and not tokenizer.prefix_after_special:
        # transformers adds SentencePiece's leading space only before the first character, and that
        # is BOS. These templates were published for tokenizers that add it to the text after BOS.
        settings |= setting("leading_space", " ")
    for key, value in template_kwargs.items():
        settings |= variable_setting(key, value, tokenizer)
    if default_system is not None:
        settings |= system_setting(default_system) if default_system else {"messages": ""}

    def build(settings: dict[str, str]) -> ChatTemplate:
        return ChatTemplate(with_settings(text, settings), tokenizer, name, enable_thinking, now)

    template = build(settings)
    # An empty system message removes the template's own system prompt. A template without one
    # would write an empty turn, or refuse the message.
    if default_system == "" and template.facts.has_own_system:
        template = build(settings | system_setting(""))
    if name in NAMES:
        check_end(template)
    if name == BAICHUAN2 and not TURN_TOKENS.keys() <= template.tokens.ids.keys():
        raise UserError(
            f"template {name} needs the tokens {', '.join(TURN_TOKENS)} of Baichuan2, which the "
            f"tokenizer of {tokenizer.source} does not have; choose another --template"
        )
    if matches := template.tokens.find(default_system or ""):
        token = template.tokens.spellings[matches[0].id]
        raise UserError(
            f"--default_system contains {token!r}, a control token of this tokenizer; remove it"
        )
    if default_system and not template.facts.knows_system:
        raise UserError(f"--default_system: the template {name} supports no system prompt")
    return template


def variable_setting(name: str, value: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """The setting of a variable of --template_kwargs; UserError if it cannot be set."""
    is_name = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    if not is_name or name in JINJA_WORDS:
        raise UserError(f"--template_kwargs: {name!r} is not a variable name")
    if name in ALREADY_SET or name in tokenizer.named_ids:
        raise UserError(
            f"--template_kwargs: {name} cannot be set: it comes from the tokenizer, the "
            "conversation or Jinja"
        )
    try:
        return setting(name, value)
    except UserError as error:
        raise UserError(f"--template_kwargs: {name}: {error}") from error


def settings_without_effect(
    template: ChatTemplate, template_kwargs: dict[str, Any] | None, enable_thinking: bool | None
) -> list[str]:
    """A line for each of these settings that the template does not read."""
    unused = []
    if enable_thinking is not None and not template.facts.has_thinking_switch:
        unused.append(f"--enable_thinking {str(enable_thinking).lower()}")
    program = split_settings(template.text)[1]
    for name in template_kwargs or {}:
        if not re.search(rf"\b{name}\b", program):
            unused.append(f"--template_kwargs {name}")
    reason = f"has no effect: the template {template.name} does not read it"
    return [f"{flag} {reason}" for flag in unused]


def check_end(template: ChatTemplate) -> None:
    """UserError if the tokenizer lacks the token that ends an answer in this template."""
    folder = template.tokenizer.source
    try:
        end, answer = template.facts.end, template.facts.answer or ""
    except TemplateError as error:
        raise UserError(
            f"template {template.name} does not fit the tokenizer of {folder}: {error}; choose "
            "another --template"
        ) from error
    if end is None:
        after = answer.rpartition(ANSWER)[2]
        raise UserError(
            f"template {template.name} ends an answer with {after.strip()!r}, which the tokenizer "
            f"of {folder} does not have as a token; choose another --template"
        )


def template_text(name: str, tokenizer: Tokenizer) -> str:
    """The Jinja text of the template `name`, without settings."""
    if name == "auto":
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.source}: the checkpoint has no chat template; choose --template "
                f"from {', '.join(NAMES)}, or name a .jinja file"
            )
        text = tokenizer.chat_template
    elif name in NAMES:
        text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = read_template_file(Path(name))
    elif name.endswith(".jinja"):
        raise UserError(f"--template {name}: there is no such file")
    else:
        raise UserError(
            f"unknown template '{name}'{_hint(name)}; choose one of auto, {', '.join(NAMES)}, or "
            "name a .jinja file"
        )
    return text


def _hint(name: str) -> str:
    """What the template of LLaMA-Factory with this name is called here; "" for any other name."""
    ours, system = TEMPLATES.get(name.lower(), (None, None))
    if not ours:
        family = re.match("[a-z]+", name.lower())
        return " (auto takes the checkpoint's own)" if family and family[0] in FAMILIES else ""
    flags = f" --default_system '{system}'" if system else ""
    return f" (LLaMA-Factory's {name} is --template {ours}{flags} here)"


def trained_template(
    name: str,
    tokenizer: Tokenizer,
    trained_dir: str | Path,
    default_system: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    enable_thinking: bool | None = None,
    now: str | None = None,
) -> ChatTemplate:
    """The template `name`; "auto" is the one that the model was trained with.

    trained_dir: the folder of the adapter or the model, where train.py saved options.toml and the
    text of its template. A folder from the hub or of export.py has the text alone. The other
    arguments by default are those of the training.
    """
    trained = recorded_options(trained_dir)
    if default_system is None:
        default_system = trained.get("default_system")
    if template_kwargs is None and (recorded := trained.get("template_kwargs")):
        template_kwargs = json.loads(recorded)
    if enable_thinking is None:
        enable_thinking = trained.get("enable_thinking")
    shown_name, text = name, None
    if name == "auto":
        shown_name, text = trained.get("template", "auto"), saved_template(trained_dir)
        name = shown_name if text is None else "auto"
        if enable_thinking is None and "enable_thinking" not in (template_kwargs or {}):
            enable_thinking = asks_for_thoughts(text or "")
    template = get_template(
        name, tokenizer, default_system, template_kwargs, enable_thinking, now, text
    )
    template.name = shown_name
    return template


def saved_template(folder: str | Path) -> str | None:
    """The chat template in the files of a folder; None if there is none, or only its name."""
    path = Path(folder)
    if recorded_options(path) and not (path / CHAT_TEMPLATE).is_file():
        return None
    return read_chat_template(path, read_json(path / "tokenizer_config.json", missing={})) or None


def asks_for_thoughts(text: str) -> bool | None:
    """True if the first lines of a saved template ask for thoughts; None if they do not say so."""
    line = split_settings(text)[0].get("enable_thinking")
    return line in setting("enable_thinking", True).values() or None
