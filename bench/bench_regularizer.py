"""The regularizer alone, value and gradient, against its peers on the same parameters; parity before a time counts."""

import pytest

from fasthyper.bench.workloads import CASES

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


@pytest.mark.parametrize(("workload", "past"), CASES["regularizer"], ids=lambda case: getattr(case, "name", case))
def bench_regularizer(against, workload, past):
    against(workload, past, "regularizer")
