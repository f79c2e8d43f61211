"""AlignmentLoss(gather=True) in two gloo processes against one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastprompt.nn import AlignmentLoss

RANKS = 2


def data(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = torch.randn(2, rows, 5, dtype=torch.float64, generator=generator)
    return student, teacher, torch.rand(rows, dtype=torch.float64, generator=generator) * (torch.arange(rows) % 4 != 1)


def model() -> tuple[torch.nn.Linear, AlignmentLoss]:
    torch.manual_seed(0)
    below = torch.nn.Linear(5, 5).double()  # stands for the prompted backbone
    return below, AlignmentLoss(5, 5, bias=True, distance="infonce+cosine", gather=True).double()


def run(below, loss, student, teacher, row_weight) -> tuple[torch.Tensor, list[torch.Tensor]]:
    value = loss(below(student), teacher, row_weight)
    value.backward()
    return value.detach(), [p.grad for module in (below, loss) for p in module.parameters()]


def on_rank(rank: int, folder, sizes: list[int], weighted: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    below, loss = model()
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    student, teacher, row_weight = (x[mine] for x in data(sum(sizes)))
    value, grads = run(below, loss, student, teacher, row_weight if weighted else None)
    for grad in grads:  # as DistributedDataParallel does
        dist.all_reduce(grad)
        grad /= RANKS
    torch.save((value, grads), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes, weighted", [([4, 4], False), ([5, 2], True)], ids=str)
def test_two_ranks_train_as_one(tmp_path, sizes, weighted):
    mp.spawn(on_rank, (tmp_path, sizes, weighted), nprocs=RANKS)
    student, teacher, row_weight = data(sum(sizes))
    want, want_grads = run(*model(), student, teacher, row_weight if weighted else None)
    for rank in range(RANKS):
        value, grads = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(grads, want_grads)
