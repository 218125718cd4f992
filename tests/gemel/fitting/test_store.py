import errno
import os
import tempfile

import pytest
import torch

from gemel.fitting import store as stores
from gemel.fitting.store import TensorStore
from gemel.fitting.teacher_samples import StoredBatches, sizes_of

TENSORS = [
    torch.rand(3, 4, 5),
    torch.arange(6).view(2, 3),
    torch.rand(4, 4).T,
    torch.rand(5).to(torch.bfloat16),
    torch.rand(8, 8)[::2],
    torch.empty(0, 3),
    torch.tensor([True, False]),
]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_tensors_come_back_bit_by_bit(limit):
    store = TensorStore(limit)
    stored = [store.put(tensor) for tensor in TENSORS]
    assert all(torch.equal(s.load(), t) and s.load().dtype == t.dtype for s, t in zip(stored, TENSORS, strict=True))
    assert (store.file_bytes > 0) == (limit == 0) and store.held_bytes <= limit


def test_what_is_beyond_the_limit_goes_to_a_file_that_has_no_name(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "BLOCK", 1 << 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = TensorStore(2 << 10)
    stored = [store.put(torch.full((64,), float(i))) for i in range(20)]
    assert store.held_bytes == 2 << 10 and store.file_bytes == (20 - 8) * 256 and not list(tmp_path.iterdir())
    assert all(torch.equal(s.load(), torch.full((64,), float(i))) for i, s in enumerate(stored))


def test_what_is_put_in_is_a_copy():
    store, tensor = TensorStore(), torch.zeros(4)
    stored = store.put(tensor)
    tensor += 1
    assert torch.equal(stored.load(), torch.zeros(4))


def test_a_full_disk_is_named_and_what_helps(monkeypatch):
    def pwrite(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="no space for 16 bytes more.*TMPDIR, or raise fit_memory") as raised:
        TensorStore(0).put(torch.zeros(4))
    assert raised.value.errno == errno.ENOSPC


def test_writes_and_reads_may_be_cut_short(monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: preadv(file, [views[0][:5]], offset))
    tensor = torch.rand(11)
    assert torch.equal(TensorStore(0).put(tensor).load(), tensor)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_batches_in_a_store_are_those_that_were_put_in(limit):
    tensors = [torch.rand(3, 3, 8, 8), torch.rand(2, 3, 8, 8)]
    lists = [[torch.rand(3, 8, 9), torch.rand(3, 7, 7)], [torch.rand(3, 4, 4)]]
    for batches, sizes in ((tensors, [3, 2]), (lists, [2, 1])):
        stored = StoredBatches(batches, TensorStore(limit))
        assert sizes_of(stored) == sizes_of(batches) == sizes and len(stored) == 2
        for found, batch in zip(stored, batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, batch, strict=True)) and len(found) == len(batch)
    assert len(stored[1:]) == 1
