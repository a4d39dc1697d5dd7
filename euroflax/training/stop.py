"""A wish to stop, from a signal or a test, and where it takes effect."""

from euroflax.experiment import Interrupted


class Stop:
    """A wish to stop: noted when it comes, acted upon where the program asks.

    A signal handler that raised at once would do so in the middle of another library's code, which may swallow the
    exception or crash on it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Notes the wish; the second one does not wait.

        Raises:
            Interrupted: there was a wish before.
        """
        again, self.reason = self.reason is not None, reason
        if again:
            self.check()

    def check(self) -> None:
        """Ends the command where there is a wish and nothing to save.

        Raises:
            Interrupted: there is a wish to stop.
        """
        if self.reason is not None:
            raise Interrupted(f"stopped by {self.reason}; the same command goes on")
