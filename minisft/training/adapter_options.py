"""The options that an adapter's training recorded.

With --adapter alone, they give base and template:

complete_options(options)           # model_name_or_path, template, default_system, ...
"""

from argparse import Namespace

from minisft.checkpoints.hub import model_or_base, resolve_adapter
from minisft.common.model_flags import TEMPLATE_FLAGS
from minisft.common.outputs import recorded_options
from minisft.text.template_choice import CHAT_TEMPLATE


def complete_options(options: Namespace) -> None:
    """Set the base of --adapter, and the template flags of its training.

    A template flag that is given stays, except --template auto, which means that of the training.
    Without --adapter nothing changes.
    """
    options.model_name_or_path = model_or_base(
        options.model_name_or_path, options.adapter, offline=options.dry_run
    )
    if not options.adapter or options.stage == "pt":
        return
    adapter_dir = resolve_adapter(options.adapter, offline=options.dry_run)
    recorded = recorded_options(adapter_dir)
    saved = adapter_dir / CHAT_TEMPLATE
    # Nothing is recorded in an adapter from the hub or of export.py. A file may have changed.
    if saved.is_file() and (not recorded or str(recorded.get("template")).endswith(".jinja")):
        recorded["template"] = str(saved)
    for name in TEMPLATE_FLAGS:
        if getattr(options, name) in (None, "auto"):
            setattr(options, name, recorded.get(name, getattr(options, name)))
