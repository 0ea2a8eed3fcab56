"""Add up what is held while a step goes by, and remember when it was most."""

from megablocks_utils.planning.model.prediction import COMPONENTS

__all__ = ["Ledger"]


class Ledger:
    """Bytes held now, by component, and at the moment when they were most.

    Attributes:
        held: now.
        total: all of it.
        moment: what the run is doing; the owner sets it.
        peak: `held` at the moment of the peak.
        peak_moment: that moment.
    """

    def __init__(self) -> None:
        self.held = dict.fromkeys(COMPONENTS, 0)
        self.total = 0
        self.moment = "setup"
        self.peak = dict(self.held)
        self.peak_moment = self.moment
        self._most = 0

    def hold(self, component: str, num_bytes: int) -> None:
        """Take memory."""
        self.held[component] += num_bytes
        self.total += num_bytes
        if self.total > self._most:
            self._most = self.total
            self.peak = dict(self.held)
            self.peak_moment = self.moment

    def free(self, component: str, num_bytes: int) -> None:
        """Give memory back."""
        self.held[component] -= num_bytes
        self.total -= num_bytes

    def transient(self, component: str, num_bytes: int) -> None:
        """Take memory and give it back."""
        if self.total + num_bytes > self._most:
            self.hold(component, num_bytes)
            self.free(component, num_bytes)

    def move(self, source: str, target: str, num_bytes: int) -> None:
        """Book under another component what is held already."""
        self.held[source] -= num_bytes
        self.held[target] += num_bytes

    def forget_peak(self) -> None:
        """Look for the peak from now on."""
        self._most = 0
        self.hold("parameters", 0)
