"""The counts of an exchange: read once, and on a GPU behind what is launched meanwhile."""

from unittest.mock import MagicMock, call

import torch

from megablocks_utils.mesh import token_exchange
from megablocks_utils.mesh.token_exchange import ExchangedCounts, PendingCounts

RECEIVED = torch.tensor([[1, 2], [3, 4]])


def test_counts_are_read_once():
    read = MagicMock(return_value=ExchangedCounts([2, 2], [3, 7], RECEIVED))
    pending = PendingCounts(read)
    read.assert_not_called()
    assert pending.wait() is pending.wait()
    read.assert_called_once_with()


def test_a_gpu_copies_counts_beside_its_main_stream(monkeypatch):
    """The copy waits for what made the counts; the host and the main stream wait for the copy."""
    main, beside, log = MagicMock(), MagicMock(), MagicMock()
    log.attach_mock(main.wait_event, "main_waits")
    log.attach_mock(beside.wait_stream, "beside_waits")
    log.attach_mock(beside.record_event.return_value.synchronize, "host_waits")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: main)
    monkeypatch.setattr(torch.cuda, "stream", log.enter)
    monkeypatch.setattr(token_exchange, "_counts_stream", lambda _device: beside)

    def receive():
        log.receive()
        return RECEIVED, torch.tensor([[2, 2], [3, 7]])

    read = token_exchange._copy_to_host(
        receive, token_exchange._read_counts, torch.device("cuda", 0)
    )
    launched = [call.beside_waits(main), call.enter(beside), call.enter().__enter__()]
    launched += [call.receive(), call.enter().__exit__(None, None, None)]
    assert log.mock_calls == launched
    counts = read()
    assert (counts.send_sizes, counts.receive_sizes) == ([2, 2], [3, 7])
    copied = beside.record_event.return_value
    assert log.mock_calls[len(launched) :] == [call.host_waits(), call.main_waits(copied)]
