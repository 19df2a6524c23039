"""Errors that a user can fix."""


# A file may hold a name of a million letters, or one that would steer the terminal.
MAX_MESSAGE_LENGTH = 2000


class UserError(ValueError):
    """A mistake that the user can mend; its message names the place and the way out."""

    def __str__(self):
        """The message as one line, whatever stood in the files that it quotes."""
        text = super().__str__()
        if len(text) > MAX_MESSAGE_LENGTH:
            text = f"{text[: MAX_MESSAGE_LENGTH // 2]} ... {text[-MAX_MESSAGE_LENGTH // 2 :]}"
        return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
