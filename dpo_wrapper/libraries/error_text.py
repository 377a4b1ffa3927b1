"""The errors of other libraries, as parts of our own sentences."""


def summarize_error(error: BaseException) -> str:
    """The first line of its message without a full stop; its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
