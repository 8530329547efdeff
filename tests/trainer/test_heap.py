"""The heap that a training begins with is out of the collector's way, and comes back."""

import gc

import pytest

from trainer.heap import frozen_heap


def fail_with_a_frozen_heap() -> None:
    with frozen_heap():
        assert gc.get_freeze_count() > 1000
        raise RuntimeError


def test_what_is_there_is_frozen_and_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError):
        fail_with_a_frozen_heap()
    assert gc.get_freeze_count() == 0
