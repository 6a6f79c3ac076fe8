"""Properties of the cores against naive models (hypothesis)."""
