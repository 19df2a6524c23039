"""How llama.cpp prompts a model: the chat template of a GGUF file, BOS and leading space.

    prompts = llama_cpp_prompts(form, tokenizer)
    prompts.chat_template, prompts.add_bos, prompts.add_space

llama.cpp renders the template and tokenizes the text, with three differences from transformers:

- If add_bos_token is true, it removes a BOS at the beginning of the text and adds its own.
- It puts SentencePiece's leading space before the text and after every special token, or nowhere
  (add_space_prefix). transformers puts it at the beginning of the text only, unless the tokenizer
  is "legacy". Then the file says "nowhere", and the chat template writes the space.
- It sets enable_thinking to true, and date_string to today. A model that was trained with other
  values gets lines in its chat template that reset them.

The choice that gives the ids of training is found by trying: `llama_cpp_ids` tokenizes like
llama.cpp.
"""

import re
from dataclasses import dataclass, field

from minisft.common.errors import UserError
from minisft.text.chat_template import ChatTemplate
from minisft.text.saved_form import SavedForm
from minisft.text.template_settings import (
    fixed_setting,
    setting,
    split_settings,
    unfixed_setting,
    with_settings,
)
from minisft.text.tokenizer import Tokenizer

WRITE_SPACE = "{{ ' ' }}"  # a template that begins with this writes the leading space
SET_BY_LLAMA_CPP = ("enable_thinking", "date_string")
QUESTION = {"role": "user", "content": "Is it 1?\n"}
ANSWER = {"role": "assistant", "content": "No, 2."}
PROBES = (
    [QUESTION],
    [{"role": "system", "content": "Be brief."}, QUESTION],
    [QUESTION, ANSWER, {"role": "user", "content": "你好"}],
)


# What some SentencePiece models change: repeated spaces, and characters with another form.
NORMALIZED = ("a  b", "\ufb01")


@dataclass(frozen=True)
class Prompts:
    """chat_template: Jinja, or None. add_bos, add_space: llama.cpp puts BOS, or a space, before a
    text. notes: differences from the training."""

    chat_template: str | None
    add_bos: bool
    add_space: bool
    notes: list[str] = field(default_factory=list)


def llama_cpp_prompts(form: SavedForm, tokenizer: Tokenizer) -> Prompts:
    """The settings of a GGUF file with which llama.cpp produces the ids of training."""
    template, add_space = form.template, tokenizer.leading_space
    text, notes = form.chat_template, normalization_notes(tokenizer)
    if template is None or text is None:
        unknown = "the chat template cannot render a plain question, so its prompts are not checked"
        notes += [] if text is None else [unknown]
        return Prompts(text, tokenizer.add_bos_token, add_space, notes)
    if form.is_trained:
        text, more = with_fixed_settings(text)
        notes += more
    for name in ("bos_token", "eos_token"):
        if name not in tokenizer.named_ids and name in text:  # llama.cpp would insert some token
            text = with_settings(text, fixed_setting(name, setting(name, "")[name]))
    bos = template.bos_token
    add_bos = bool(bos) and template.facts.prompt.startswith(bos)
    texts = [rendered for probe in PROBES if (rendered := render(template, probe)) is not None]
    wanted = [ids_in_one_piece(template, rendered) for rendered in texts]
    choices = [(True, ""), (False, ""), (False, " ")] if add_space else [(False, "")]

    counts = [
        sum(
            llama_cpp_ids(template, written + each, add_bos, space) == ids
            for each, ids in zip(texts, wanted, strict=True)
        )
        for space, written in choices
    ]
    space, written = choices[counts.index(max(counts))]
    if max(counts) < len(texts):
        notes.append(why_ids_differ(template, texts, add_bos))
    if space != add_space:
        notes.append(
            "llama.cpp adds no leading space to a text, because it would add one after every "
            "special token too; prompts without the chat template must begin with a space"
        )
    return Prompts(WRITE_SPACE * bool(written) + text, add_bos, space, notes)


def normalization_notes(tokenizer: Tokenizer) -> list[str]:
    """A note if the tokenizer changes texts first, which GGUF cannot express; else []."""
    for text in NORMALIZED:
        ids = tokenizer.encode(text, continuation=True)
        read = tokenizer.decode(ids, skip_special_tokens=False)
        if read != text and tokenizer.named_ids.get("unk_token") not in ids:
            return [
                f"this tokenizer reads {text!r} as {read!r}, and llama.cpp changes no text; where "
                "a text has that, its tokens differ from those of training"
            ]
    return []


def with_fixed_settings(text: str) -> tuple[str, list[str]]:
    """(a template that ignores the values that llama.cpp sets, notes)."""
    settings, _ = split_settings(text)
    fixed, notes = {}, []
    for name in SET_BY_LLAMA_CPP:
        line = settings.get(name)
        # llama.cpp's own value is true if the template can ask for thoughts.
        if line in setting(name, True).values() or not re.search(rf"\b{name}\b", text):
            continue
        fixed |= fixed_setting(name, line)
        if name == "enable_thinking" and line is not None:
            notes.append(
                "llama.cpp asks for thoughts by default, so the file turns enable_thinking off, "
                "as in training; export with --enable_thinking true for a model that thinks"
            )
    return with_settings(text, fixed), notes


def checkpoint_text(text: str, space_at_start: bool) -> str:
    """The chat template of the checkpoint from which a GGUF file was made.

    space_at_start: the tokenizer adds the space that the file's template writes.
    """
    if space_at_start:
        text = text.removeprefix(WRITE_SPACE)
    settings, rest = split_settings(text)
    restored = {}
    for name, line in settings.items():
        if name in SET_BY_LLAMA_CPP:
            restored |= unfixed_setting(name, line)
        elif name not in ("bos_token", "eos_token"):
            restored[name] = line
    return "".join(restored.values()) + rest


def render(template: ChatTemplate, messages: list[dict[str, str]]) -> str | None:
    """A prompt as text; None if the template refuses the conversation."""
    try:
        return template.render(messages, add_generation_prompt=True)
    except UserError:
        return None


def ids_in_one_piece(template: ChatTemplate, text: str) -> list[int]:
    """The ids of transformers."""
    return template.tokens.encode(text, 0, len(text), template.tokens.find(text))


def llama_cpp_ids(template: ChatTemplate, text: str, add_bos: bool, add_space: bool) -> list[int]:
    """The ids of llama.cpp."""
    tokenizer, space, ids = template.tokenizer, " " * add_space, []
    if add_bos:
        text = text.removeprefix(template.bos_token)
        ids.append(tokenizer.bos_token_id)
    place = 0
    for match in template.tokens.find(text):
        token = tokenizer.token_text(match.id) or ""
        start = text.index(token, match.start)  # white space beside a token stays
        if place < start:
            ids += tokenizer.encode(space + text[place:start], continuation=True)
        ids.append(match.id)
        place = start + len(token)
    if place < len(text):
        ids += tokenizer.encode(space + text[place:], continuation=True)
    return ids


def why_ids_differ(template: ChatTemplate, texts: list[str], add_bos: bool) -> str:
    """A sentence that says what llama.cpp does differently."""
    if add_bos and not all(text.startswith(template.bos_token) for text in texts):
        return (
            "llama.cpp puts BOS before every prompt; this chat template writes none before some, "
            "such as prompts with a system message"
        )
    strips = template.tokenizer.engine.strips
    used = {match.id for text in texts for match in template.tokens.find(text)}
    swallow = [template.tokenizer.token_text(id) for id in sorted(used) if any(strips.get(id, ()))]
    if swallow:
        return (
            f"llama.cpp keeps the white space beside {', '.join(map(str, swallow))}, which this "
            "tokenizer swallows; its prompts have other tokens there than in training"
        )
    return (
        "llama.cpp puts a leading space before all text that directly follows a special token, "
        "or before none; this model was trained with both, so some prompts differ there"
    )
