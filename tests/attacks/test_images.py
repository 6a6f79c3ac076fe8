"""Hostile jobs in hostile images, in every mode this machine allows."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.attacks.modes import MODES, backend_of, run_module

_KINDS = ("writes", "host", "leaks", "setuid", "devices", "mounts", "usual")
_NAMES = [f"{image}-{kind}" for image in ("directory", "layout") for kind in _KINDS]


@functools.cache
def results(mode: str) -> dict[str, Any]:
    found: dict[str, Any] = run_module(mode, "tests.attacks.images", backend_of(mode))["results"]
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*_NAMES, "images-unchanged", "host-unchanged"])
def test_the_image_holds(mode: str, name: str) -> None:
    result = results(mode)[name]
    assert result["held"], result["saw"]
