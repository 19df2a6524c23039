"""Quantities in words."""


def duration(seconds: float) -> str:
    """A duration in words."""
    if seconds < 120:
        return f"{seconds:.0f} second{'' if round(seconds) == 1 else 's'}"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 96 * 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 86400:,.1f} days"
