"""Errors that a user can fix."""

# A hostile file may contain a name of a million letters.
MAX_MESSAGE_LENGTH = 2000


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """True if memory was too small, on a GPU or on the CPU."""
    # Compare by name, because torch may not be loaded.
    is_torch_error = type(error).__name__ == "OutOfMemoryError"
    is_torch_error |= "DefaultCPUAllocator" in str(error)
    return is_torch_error or isinstance(error, MemoryError)


class UserError(ValueError):
    """A mistake the user can fix. The message says what is wrong, where, and what to do."""

    def __str__(self) -> str:
        """The message on one line, shortened, with control characters escaped."""
        text = super().__str__()
        if len(text) > MAX_MESSAGE_LENGTH:
            half = MAX_MESSAGE_LENGTH // 2
            text = f"{text[:half]} ... {text[-half:]}"
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
