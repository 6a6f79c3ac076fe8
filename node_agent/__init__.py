"""One per node: takes intents, runs attempts in sandboxes, reports topology and results."""
