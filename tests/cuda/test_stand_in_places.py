"""The stand-in GPU's copies to the host, and its events."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.stand_in_cases import SHAPE, filled, operations, started


@pytest.mark.parametrize("late", [False, True])
def test_downloads_are_of_their_place_in_the_stream(late):
    gpu = started(late=late)
    x = filled(gpu, 1)
    first = gpu.download(x)
    gpu.zero(x)
    second = gpu.download(x)
    gpu.upload(x, np.full(SHAPE, 7, np.float32))
    assert (second.wait() == 0).all()
    assert (first.wait() == 1).all()


def test_late_downloads_are_not_there_at_once():
    gpu = started(late=True)
    x = filled(gpu, 1)
    first, second, event = gpu.download(x), gpu.download(x), gpu.event()
    assert not first.done()
    assert not event.done()
    assert event.done()
    assert first.done()
    assert second.done()  # it lies before the event
    assert gpu.counts["waits"] == 0
    (second.wait(), first.wait(), event.wait())
    assert gpu.counts["waits"] == 0
    third = gpu.download(x)
    (third.wait(), third.wait())
    assert gpu.counts["waits"] == 1
    fourth = gpu.download(x)
    gpu.wait()
    assert fourth.done()
    assert gpu.counts["waits"] == 2


@pytest.mark.parametrize("late", [False, True])
def test_downloads_last_until_two_more_of_the_same(late):
    gpu = started(late=late)
    x = filled(gpu, 1)
    download = gpu.download(x)
    old, unread = download.wait(), gpu.download(x)
    gpu.zero(x)
    other = gpu.download(filled(gpu, 5)).wait()
    assert (old == 1).all()
    gpu.download(x)
    assert not (old == 1).any()
    with pytest.raises(AssertionError, match="downloaded twice more"):
        download.wait()
    assert (unread.wait() == 1).all()
    assert (other == 5).all()


def test_events_tell_the_costs_of_what_lies_between(gpu):
    x, ops = filled(gpu), operations(gpu)
    gpu.costs["relu"] = 0.25
    ops.relu(x, x)
    graph = gpu.capture(lambda: (gpu.zero(x), ops.relu(x, x)))
    first = gpu.event()
    gpu.zero(x)
    graph.launch()
    second = gpu.event()
    assert second.ms_since(first) == 2.25
    assert first.ms_since(second) == -2.25
