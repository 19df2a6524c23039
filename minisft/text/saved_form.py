"""The chat template and stop tokens that a saved model carries for other programs.

    form = saved_form(tokenizer, "auto", "runs/cherry", listed_stops=[2])
    print(form.chat_template, form.stop_ids)

A model that was fine-tuned with `--template alpaca` must be prompted in this form by every program,
whatever chat template its base has. So the saved text is that of the training. Its first lines set
the variables that the training passed to the template, see template_settings.py.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisft.common.outputs import recorded_options
from minisft.text.chat_template import ChatTemplate
from minisft.text.rendering import TemplateError
from minisft.text.template_choice import saved_template, settings_without_effect, trained_template
from minisft.text.template_settings import setting, split_settings, with_settings
from minisft.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SavedForm:
    """How other programs prompt a model.

    template: as in training; None if there is none, or if it cannot render a question.
    chat_template: its text for other programs. stop_ids: the tokens that end an answer.
    is_trained: False for a checkpoint's own template, as it was published. notes: lines to print.
    """

    template: ChatTemplate | None
    chat_template: str | None
    stop_ids: list[int]
    is_trained: bool = True
    notes: list[str] = field(default_factory=list)


def saved_form(
    tokenizer: Tokenizer,
    name: str,
    trained_dir: str | Path,
    listed_stops: list[int],
    **choices: Any,
) -> SavedForm:
    """The form of a folder for transformers and vLLM.

    name: a template; "auto" is that of the training, else the checkpoint's own. listed_stops: the
    stop tokens of generation_config.json. choices: default_system, template_kwargs and
    enable_thinking, if they are not those of the training.
    """
    trained = recorded_options(trained_dir)
    chosen = name != "auto" or any(choice is not None for choice in choices.values())
    untouched = not chosen and (not trained or trained.get("stage") == "pt")
    if not chosen and not tokenizer.chat_template and trained.get("template", "auto") == "auto":
        if saved_template(trained_dir) is None:
            return SavedForm(None, None, listed_stops)
    template = trained_template(name, tokenizer, trained_dir, **choices)
    try:
        stop_ids = sorted(template.stop_token_ids(listed_stops))
    except TemplateError:  # such a template cannot have been used in training
        return SavedForm(None, template.text, listed_stops, is_trained=False)
    if untouched and not split_settings(template.text)[0]:
        return SavedForm(template, template.text, stop_ids, is_trained=False)
    notes = settings_without_effect(
        template, choices.get("template_kwargs"), choices.get("enable_thinking")
    )
    return SavedForm(template, saved_text(template), stop_ids, notes=notes)


def saved_text(template: ChatTemplate) -> str:
    """The template's text, which asks for thoughts by default only if the training did."""
    settings = {}
    for name, value in template.thinking.items():
        if re.search(rf"\b{name}\b", template.text):
            settings |= setting(name, value)
    return with_settings(template.text, settings)
