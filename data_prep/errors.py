"""Errors of data preparation: one line for a person, and the exit code the process ends with."""


class PreparationError(Exception):
    """Base of what a user can get wrong. The message says what, where (file:line or dotted key) and what to do."""

    exit_code = 70


class BadDataError(PreparationError):
    """A record, tokenizer or store does not hold what it should."""

    exit_code = 65


class UntrainableError(BadDataError):
    """Records of a batch that would train nothing; `indices` says which. The message is about the first."""

    def __init__(self, message: str, indices: tuple[int, ...]):
        super().__init__(message, indices)  # what it is made again from, in another process
        self.indices = indices

    def __str__(self) -> str:
        return str(self.args[0])


class MissingInputError(PreparationError):
    """A file or folder that was named does not exist."""

    exit_code = 66


class CannotWriteError(PreparationError):
    """The store folder cannot be created or written."""

    exit_code = 73


class StorageError(PreparationError):
    """Reading or writing failed half-way."""

    exit_code = 74


class RefusedError(PreparationError):
    """An input would run code or leave its folder."""

    exit_code = 77


class DataConfigError(PreparationError):
    """The ``data`` section asks for something impossible."""

    exit_code = 78


def overlong_message(where: str, num_tokens: int, row_tokens: int) -> str:
    """The one line for a record that fits no row."""
    return (
        f"{where}: {num_tokens} tokens do not fit a row of {row_tokens} (data.row_tokens);"
        " raise it, or set data.overlong to drop, split or truncate"
    )
