"""The chat template that a saved model carries, so that other programs prompt it as in training.

    form = conversation_form(tokenizer, "auto", "runs/cherry", listed_stops=[2])
    print(form.chat_template, form.stop_ids)
    text = as_jinja(get_template("alpaca", tokenizer))

A model that was fine-tuned with `--template alpaca` must be prompted in this form by every program,
whatever chat template its base has. Our templates do not offer tools to other programs.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.outputs import recorded_options
from minisft.text.template import Template, get_template, is_form
from minisft.text.tokenizer import Tokenizer

SKELETON = """\
{%- set system = DEFAULT -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content']STRIP -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- set system = PREFACE + system -%}
{{- BEGIN -}}
{%- if system -%}
{{- SYSTEM -}}
{%- endif -%}
{%- for message in turns -%}
{%- set content = message['content']STRIP -%}
{%- if message['role'] == 'assistant' -%}
{{- ANSWER -}}
{%- else -%}
{%- if not loop.first -%}
{{- BETWEEN -}}
{%- elif system -%}
{%- set content = FIRST -%}
{%- endif -%}
{{- USER -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ASSISTANT -}}
{%- endif -%}
"""
VARIABLES = {
    "{bos}": "bos_token",
    "{eos}": "eos_token",
    "{content}": "content",
    "{system}": "system",
}
SPACE_BEFORE = "{{ bos_token + ' ' }}"  # for chat templates without BOS


@dataclass(frozen=True)
class ConversationForm:
    """How other programs prompt a model.

    chat_template: Jinja, or None. stop_ids: the tokens that end an answer. is_exact: llama.cpp
    produces the ids of the training. writes_space: the chat template writes SentencePiece's leading
    space, so llama.cpp must not add it.
    """

    chat_template: str | None
    stop_ids: list[int]
    is_exact: bool = True
    writes_space: bool = False


def trained_template(
    name: str, tokenizer: Tokenizer, trained_dir: str | Path, default_system: str | None = None
) -> Template:
    """The template `name`; "auto" is the one that the model was trained with.

    trained_dir: the folder of the adapter or the model, where train.py has left options.toml.
    default_system: for conversations without a system prompt; by default that of the training.
    """
    trained = recorded_options(trained_dir)
    if name == "auto":
        name = trained.get("template", "auto")
    if default_system is None:
        default_system = trained.get("default_system")
    return get_template(name, tokenizer, default_system)


def conversation_form(
    tokenizer: Tokenizer,
    name: str,
    trained_dir: str | Path,
    listed_stops: list[int],
    for_llama_cpp: bool = False,
) -> ConversationForm:
    """The ConversationForm that a saved model carries.

    name: one of our templates; "auto" is the one of the training, else the checkpoint's own, which
    is kept as it is. listed_stops: the stop tokens of generation_config.json.
    """
    trained = recorded_options(trained_dir)
    name = trained.get("template", "auto") if name == "auto" else name
    default_system = trained.get("default_system")
    try:
        template = get_template(name, tokenizer, default_system)
    except UserError:
        if name != "auto":
            raise
        is_exact = tokenizer.chat_template is None or not _has_one_space(tokenizer)
        return ConversationForm(tokenizer.chat_template, listed_stops, is_exact)
    stop_ids = sorted(template.stop_token_ids(listed_stops))
    if for_llama_cpp:
        return _form_for_llama_cpp(template, default_system, stop_ids)
    return ConversationForm(chat_template_text(template, default_system), stop_ids)


def _form_for_llama_cpp(
    template: Template, default_system: str | None, stop_ids: list[int]
) -> ConversationForm:
    """With SentencePiece, llama.cpp adds a space to all text after a special token, or never.

    If the training had a space only at the start, the chat template writes it and llama.cpp adds
    none.
    """
    tokenizer, form = template.tokenizer, template.form
    if not (_has_one_space(tokenizer) and text_follows_control(template)):
        text = chat_template_text(template, default_system, puts_space=True)
        return ConversationForm(text, stop_ids)
    text = chat_template_text(template, default_system)
    if form.control:  # prompts begin with a special token, not with text
        return ConversationForm(text, stop_ids, writes_space=True)
    if tokenizer.bos_token_id is None or not (template.writes_bos or tokenizer.add_bos_token):
        return ConversationForm(text, stop_ids, is_exact=False)
    if text == tokenizer.chat_template:
        own = text.removeprefix(SPACE_BEFORE)
        text = as_jinja(template) if "bos_token" in own else SPACE_BEFORE + own
    return ConversationForm(text, stop_ids, writes_space=True)


def _has_one_space(tokenizer: Tokenizer) -> bool:
    """True if a text gets a leading space, but not after special tokens."""
    return tokenizer.leading_space and not tokenizer.prefix_after_special


def text_follows_control(template: Template) -> bool:
    """True if prompts have text directly after a special token other than BOS: `</s>\n`."""
    words = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    controls = set(template.control_ids.values())
    return any(
        id in controls - {template.tokenizer.bos_token_id} and following not in controls
        for id, following in pairwise(template.encode_prompt(words))
    )


def chat_template_text(
    template: Template, default_system: str | None = None, puts_space: bool = False
) -> str:
    """The checkpoint's own chat template if it is this template, else ours as Jinja.

    default_system: the --default_system of the training. puts_space: see as_jinja.
    """
    own = template.tokenizer.chat_template
    if own is not None and default_system is None and is_form(own, template.name):
        return own
    return as_jinja(template, puts_space)


def as_jinja(template: Template, puts_space: bool = False) -> str:
    """Jinja that renders what `template.encode` encodes, for messages without tools.

    It writes BOS even if the tokenizer would add it: most programs that render a chat template add
    none, and llama.cpp adds it only if it is missing. puts_space: the program adds SentencePiece's
    leading space after BOS. transformers does so only for legacy tokenizers.
    """
    form, variables = template.form, _variables(template, puts_space)

    def expression(pattern: str) -> str:
        """`[INST] {content}` -> `"[INST] " + content`."""
        parts = re.split("(" + "|".join(map(re.escape, variables)) + ")", pattern)
        parts = [
            variables.get(part, part and json.dumps(part, ensure_ascii=False)) for part in parts
        ]
        return " + ".join(part for part in parts if part) or '""'

    adds_bos = template.tokenizer.add_bos_token and not template.writes_bos
    default = template.default_system
    default = form.default_system if default is None else default
    parts = {
        "DEFAULT": json.dumps(default, ensure_ascii=False),
        "PREFACE": json.dumps(template.preface),
        "STRIP": " | trim" if form.strip else "",
        "BEGIN": expression("{bos}" * adds_bos + form.begin),
        "SYSTEM": expression(form.system.replace("{content}", "{system}")),
        "ANSWER": expression(form.assistant + form.answer + form.after),
        "BETWEEN": expression(form.between),
        "FIRST": expression(form.system_in_user.replace("{content}", "{system}") + "{content}"),
        "USER": expression(form.user),
        "ASSISTANT": expression(form.assistant),
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], SKELETON)


def _variables(template: Template, puts_space: bool) -> dict[str, str]:
    """{field of a Format: its Jinja expression}."""
    tokenizer = template.tokenizer
    if tokenizer.bos_token_id is None:
        return {**VARIABLES, "{bos}": ""}
    puts_space = puts_space or tokenizer.prefix_after_special
    if tokenizer.leading_space and not puts_space and not template.form.control:
        return {**VARIABLES, "{bos}": 'bos_token + " "'}
    return VARIABLES
