"""Errors a person can act on, each with the exit code the process ends with.

The codes follow sysexits where it has a fitting one; a supervisor and a batch script decide on
them whether to requeue. Everything else that is raised is a defect of ours and ends with 70.
"""

COMPLETE = 0
STOPPED_WITH_CHECKPOINT = 75
INTERNAL = 70
#: What a rank says that is fine itself: another one tells the story.
OTHER_RANK_FAILED = "another rank failed"
#: Set by a supervisor that reads the ranks' exit records and tells the reason itself, once: its host/token.
SUPERVISED = "FULLTUNE_SUPERVISED"
#: The path of a FIFO that the supervisor holds open for as long as it lives.
SUPERVISOR_FIFO = "FULLTUNE_SUPERVISOR_FIFO"
#: A rank that hung, was killed, or was left alone.
LOST_PEER = 76


class FulltuneError(Exception):
    """Base of the errors whose message is for a person: what, where, what to do, in one line for each finding."""

    exit_code = INTERNAL


class ConfigError(FulltuneError):
    """The run file, a DeepSpeed JSON or the command line asks for something impossible."""

    exit_code = 78


class DataError(FulltuneError):
    """A token store, checkpoint or model does not hold what it says or what is needed."""

    exit_code = 65


class MissingInputError(FulltuneError):
    """A file or folder that was named does not exist."""

    exit_code = 66


class CannotWriteError(FulltuneError):
    """An output cannot be created."""

    exit_code = 73


class StorageError(FulltuneError):
    """Reading or writing failed half-way."""

    exit_code = 74


class RefusedForSecurityError(FulltuneError):
    """The input would run code or leave its folder."""

    exit_code = 77


class NumericalStopError(FulltuneError):
    """A loss or gradient was not finite; no weight was changed by that step."""

    exit_code = 79


class StoppedError(FulltuneError):
    """Stopped on request; a checkpoint is committed, and the same command goes on from it."""

    exit_code = STOPPED_WITH_CHECKPOINT
