"""What the entry points do around their work."""

from __future__ import annotations

import gc

import pytest

from grpo_mlflow.cli.command import importing


def test_garbage_is_looked_for_again_after_importing() -> None:
    frozen, threshold = gc.get_freeze_count(), gc.get_threshold()
    gc.set_threshold(700)
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError("a library is broken")
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
        assert gc.get_threshold()[0] == 10_000
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
