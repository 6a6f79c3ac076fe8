"""The three roots of error: the job's fault, the platform's fault, our bug.

A message says what is wrong *and what to do*; the CLI prints it as its one line.
"""


class OutriderError(Exception):
    """Root of every error we raise on purpose."""


class JobFaultError(OutriderError):
    """The job or its submission is wrong; trying again unchanged will fail again."""


class InvalidRecordError(JobFaultError):
    """Bytes that are not the record they claim to be. `code` is stable; the message is for us."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PlatformFaultError(OutriderError):
    """Something around the job failed. `retryable` says whether the same call may succeed later."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class ConfigError(PlatformFaultError):
    """A setting, file or argument is missing or wrong."""


class BrokerUnavailableError(PlatformFaultError):
    """No Kafka broker answered in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class LedgerCorruptError(PlatformFaultError):
    """A ledger record that cannot be understood. The reader stops: skipping could fork history."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(
            f"ledger record at offset {offset} cannot be read: {message}; "
            "upgrade this process or restore the ledger, no record is ever skipped"
        )
        self.offset = offset


class InvariantBrokenError(OutriderError):
    """Our bug: a transition or a state that must not exist. Carries the story that led there."""

    def __init__(self, message: str, story: tuple[str, ...] = ()) -> None:
        told = "".join(f"\n  {line}" for line in story)
        super().__init__(message + (f"; story:{told}" if story else ""))
        self.story = story
