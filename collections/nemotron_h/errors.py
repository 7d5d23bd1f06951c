"""The error a user can act on: one message, one hint, no traceback."""


class UserError(Exception):
    """Something the user can fix: bad input, missing data, no network, a full disk.

    The command line prints `message` and `hint` without a traceback and exits with `EXIT_CODE`.

    Args:
        message: what is wrong, naming the key, file or package.
        hint: what to do about it (one line or a few); empty when the message says it all.
    """

    EXIT_CODE = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def report(error: UserError) -> None:
    """Print the error and what to do about it on the standard error, as every command does."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message))  # text, not markup: messages have brackets
    if error.hint:
        console.print(Text.assemble(("fix: ", "bold"), error.hint))
