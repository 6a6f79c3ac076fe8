"""What holds for every test."""

from hypothesis import settings

# The same examples every time, and no clock that judges them: a busy machine is no failure.
# To look for new ones: pytest --hypothesis-profile=default.
settings.register_profile("outrider", deadline=None, derandomize=True)
settings.load_profile("outrider")
