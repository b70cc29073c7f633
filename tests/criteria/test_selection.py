"""The lowest of each row: as row by row."""

import pytest
import torch

from hf_prune.criteria.selection import lowest, lowest_by_row


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(20))
def test_rows_together_are_rows_one_by_one(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(9, 12, generator=generator)
    if ties:
        score = (score * 3).round() / 3 * (1 + 1e-7 * torch.rand(9, 12, generator=generator).round())
    present = torch.rand(9, 12, generator=generator) > 0.2
    present[0] = False
    gone = torch.rand(9, 12, generator=generator) > 0.8
    wanted = torch.randint(0, 13, (9,), generator=generator) if seed % 2 else torch.full((9,), 5)
    removed, near = lowest_by_row(score, present, gone, wanted)
    alone = [lowest(*row, n) for *row, n in zip(score, present, gone, wanted.tolist(), strict=True)]
    assert torch.equal(removed, torch.stack([rows for rows, _ in alone]))
    assert near == sum(n for _, n in alone)
