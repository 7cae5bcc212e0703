"""Sums over microbatches change nothing but themselves."""

from __future__ import annotations

import torch

from autopar.runtime.accumulate import Accumulator, own_copies, storages


def test_shared_memory_is_copied_before_it_is_added_to() -> None:
    both = torch.ones(4)
    views = torch.arange(6.0)
    outputs = {
        "a": [both],
        "b": [both],  # the same tensor under two names
        "c": [views[:3]],  # a part of something larger
        "d": [torch.zeros(()).expand(3)],  # one number seen three times
        "sent": [torch.ones(2)],
    }
    sums = Accumulator()
    for _ in range(3):
        sums.add(outputs, ("a", "b", "c", "d"), reused=True)
    got = sums.take()
    assert torch.equal(both, torch.ones(4))
    assert torch.equal(views, torch.arange(6.0))
    assert torch.equal(got["a"][0], torch.full((4,), 3.0))
    assert torch.equal(got["b"][0], torch.full((4,), 3.0))
    assert torch.equal(got["c"][0], torch.tensor([0.0, 3.0, 6.0]))
    assert torch.equal(got["d"][0], torch.zeros(3))
    assert not sums.take()


def test_a_tensor_of_its_own_becomes_the_sum() -> None:
    alone = torch.ones(4)
    assert own_copies({"a": [alone]})["a"][0] is alone


def test_so_does_one_with_channels_last_but_no_transposed_one() -> None:
    images = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert own_copies({"a": [images]})["a"][0] is images
    turned = torch.ones(3, 4).T
    copied = own_copies({"a": [turned]})["a"][0]
    assert copied is not turned and torch.equal(copied, turned)


def test_what_others_may_still_read_is_copied() -> None:
    sent, sums = torch.ones(4), Accumulator()
    for _ in range(2):
        sums.add({"a": [sent]}, ("a",), reused=True, shared=storages({"sent": [sent.view(2, 2)]}))
    assert torch.equal(sent, torch.ones(4))
    assert torch.equal(sums.take()["a"][0], torch.full((4,), 2.0))
