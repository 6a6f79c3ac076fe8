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


class LedgerTruncatedError(PlatformFaultError):
    """The ledger's first records are gone and no snapshot stands in for them."""

    def __init__(self, topic: str, low: int, refused: tuple[str, ...] = ()) -> None:
        why = f" ({'; '.join(refused)})" if refused else ""
        super().__init__(
            f"{topic} starts at offset {low}: its older records were deleted, and no snapshot "
            f"says what they did{why}; restore the topic or the snapshots"
        )
        self.low = low
        self.refused = refused


class SnapshotRefusedError(PlatformFaultError):
    """A snapshot that is corrupt, unknown, or of another ledger. Nothing is lost: see recovery."""

    def __init__(self, next_offset: int, why: str) -> None:
        at = f" at ledger offset {next_offset}" if next_offset >= 0 else ""
        super().__init__(f"snapshot{at} is refused: {why}; an older one or the ledger is used")
        self.next_offset = next_offset
        self.why = why


class InvariantBrokenError(OutriderError):
    """Our bug: a transition or a state that must not exist. Carries the story that led there."""

    def __init__(self, message: str, story: tuple[str, ...] = ()) -> None:
        told = "".join(f"\n  {line}" for line in story)
        super().__init__(message + (f"; story:{told}" if story else ""))
        self.story = story
