"""Breaking it on purpose: simulator, faults, checkers (the harness grows with issue 2)."""
