"""Shared by the kernel tests."""

from __future__ import annotations

import pytest

from ctxfast.kernels import attention_tables


@pytest.fixture(params=["one block", "split"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two forms of the backward: short sequences are made to take the path of long ones too."""
    if request.param == "split":
        monkeypatch.setattr(attention_tables, "one_block_launch", lambda *arguments: None)
    return request.param
