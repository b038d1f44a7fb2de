"""Ranks on GPUs, over NCCL: the curves of one process to rounding, the same bits on both ranks."""

import json

import pytest
import rank_jobs
import torch
import torch.multiprocessing
from test_distributed import relative

COUNT = 2


@pytest.mark.gpu
def test_ranks_over_nccl_take_the_steps_of_one_process(tmp_path):
    torch.multiprocessing.start_processes(rank_jobs.work_on_gpus, (COUNT, str(tmp_path)), COUNT, start_method="spawn")
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(COUNT)]
    for case in rank_jobs.ON_GPUS:
        alone = rank_jobs.found(rank_jobs.train(case, rank_jobs.trainer_for(case, device="cuda", graph=False)))
        assert relative(reports[0][case]["curves"], alone["curves"]) < 1e-10, case
        assert relative(reports[0][case]["state"], alone["state"]) < 1e-10, case
        assert reports[1][case] == reports[0][case], case
