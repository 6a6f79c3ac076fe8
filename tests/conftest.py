"""What holds for every test."""

from hypothesis import settings

# The same examples every time on the same tree (hypothesis draws some from literals of our modules,
# so that a change anywhere may bring new ones), and no clock: a busy machine is no failure.
# To look for new ones: pytest --hypothesis-profile=default.
settings.register_profile("outrider", deadline=None, derandomize=True)
settings.load_profile("outrider")
