"""Small and fast: who leads, what is decided. Pure decisions in `core`, the DDS shell beside it."""
