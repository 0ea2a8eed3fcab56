"""Which tokens go to which rank, and which rows they become there, by plain counting."""

import pytest
import torch

from megablocks_utils.kernels.permute import sort_by_expert
from megablocks_utils.mesh.token_dispatch import (
    find_places,
    find_ranks_of_tokens,
    list_copies,
    list_received_rows,
)
from megablocks_utils.mesh.token_exchange import ExchangedCounts, TokenSizes


def draw_index(rank, num_tokens, top_k, num_experts, has_twins):
    generator = torch.Generator().manual_seed(rank)
    if has_twins:
        return torch.randint(num_experts, (num_tokens, top_k), generator=generator)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]


def expect_rows(token, num_tokens):
    """Return the rows token by token, and where each token's start."""
    by_token = [[row for row, t in enumerate(token) if t == n] for n in range(num_tokens)]
    starts = [sum(map(len, by_token[:n])) for n in range(num_tokens)]
    return [row for rows in by_token for row in rows], starts


def check_rows(rows, token, num_tokens):
    assert rows.token.tolist() == token
    assert (rows.by_token.tolist(), rows.starts.tolist()) == expect_rows(token, num_tokens)


@pytest.mark.parametrize("has_twins", [False, True])  # one expert twice: as zero experts do it
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [((3, 0, 5, 1), 2, 8), ((7, 4), 3, 6), ((0, 0), 2, 4), ((5, 6, 7), 5, 6), ((4, 4), 1, 2)],
)
def test_copies_and_rows(num_tokens, top_k, num_experts, has_twins):
    ranks = range(len(num_tokens))
    num_local = num_experts // len(ranks)
    index = [draw_index(r, n, top_k, num_experts, has_twins) for r, n in enumerate(num_tokens)]
    owners = [(i // num_local).tolist() for i in index]
    copies = [[(p, t) for p in ranks for t, own in enumerate(owners[r]) if p in own] for r in ranks]
    goes = [find_ranks_of_tokens(i, num_local, len(ranks)) for i in index]
    orders = [sort_by_expert(i, num_experts) for i in index]
    counts = [order.tokens_per_expert.view(len(ranks), -1) for order in orders]
    places = [
        find_places(*of_rank, num_local)[order.order].split(count.sum(1).tolist())
        for *of_rank, order, count in zip(goes, index, orders, counts, strict=True)
    ]
    for rank in ranks:
        sent = list_copies(goes[rank], len(copies[rank]))
        check_rows(sent, [token for _, token in copies[rank]], num_tokens[rank])
        came = [(r, token) for r in ranks for to, token in copies[r] if to == rank]
        received = torch.tensor([sum(r == sender for r, _ in came) for sender in ranks])
        rows, _ = list_received_rows(
            ExchangedCounts([], [], torch.stack([count[rank] for count in counts])),
            TokenSizes([], received.tolist(), received),
            torch.cat([places[sender][rank] for sender in ranks]),
        )
        experts = range(rank * num_local, (rank + 1) * num_local)
        wanted = [
            came.index((sender, token))
            for expert in experts
            for sender in ranks
            for token, chosen in enumerate(index[sender].tolist())
            for _ in range(chosen.count(expert))
        ]
        check_rows(rows, wanted, len(came))
